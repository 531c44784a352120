"""The metrics that can be asked for, and what papers call them."""

METRICS = ("fd", "sfd", "is", "kid", "precision_recall", "density_coverage")

# Only the original network's figures may have the names that papers mean.
INCEPTION_NAMES = {"fd": "FID", "sfd": "sFID", "is": "Inception Score", "kid": "KID"}
PLAIN_NAMES = {
    "fd": "Fréchet distance",
    "sfd": "spatial Fréchet distance",
    "is": "class score",
    "kid": "kernel distance",
}

"""The demo: a page that draws stage by stage."""

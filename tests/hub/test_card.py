"""What a model's card carries: no folder of the machine, and texts as they are, whatever they are made of."""

import html
import json
import re

import pytest
from helpers import tiny_pipeline
from huggingface_hub import ModelCard

from diffusers_dod.hub import collect_upload, push_folder
from diffusers_dod.hub.card import build_card
from diffusers_dod.hub.text import escape_markdown, has_local_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline(id2label={0: "cat", 1: "dog"}).save_pretrained(folder)
    return folder


LOCAL = [
    "/home/bob/secret/set",
    "~/secret/set",
    "~bob/secret",
    "./secret",
    "../secret/set",
    r"C:\Users\bob\secret",
    "D:/secret/set",
    r"\\server\secret",
    "file:///mnt/secret",
    "$HOME/secret",
    "${SCRATCH}/secret",
    "data/secret/set",
    r"data\secret",
    "/mnt/My secret/pictures of mine",
    "made from /mnt/secret, twice",
    "encoder (/mnt/secret.pt)",
]
PUBLIC = [
    "stabilityai/sd-vae-ft-ema",
    "mnist",
    "1/2",
    "red and/or blue",
    "https://huggingface.co/datasets/user/name",
    "s3://bucket/of/somebody",
    "FID (a small CNN; 64 features)",
    "betas 0.9, 0.95",
    "a: b",
    "<b>bold</b>",
    "",
]


@pytest.mark.parametrize("text", LOCAL)
def test_local_paths_are_recognised(text):
    assert has_local_path(text) and has_local_path(["mnist", text])


@pytest.mark.parametrize("text", PUBLIC)
def test_other_texts_are_no_local_paths(text):
    assert not has_local_path(text)


@pytest.mark.parametrize("path", LOCAL)
def test_no_folder_of_the_machine_in_head_tables_and_evaluation(path, folder):
    training = {"dataset_name": path, "repa_encoder": path, "note": path, "files": [path], "ema_decay": 0.9}
    training |= {"train_data_dir": path, "latents_dir": path, "vae_name_or_path": path, path: 1}
    (folder / "training_config.json").write_text(json.dumps(training))
    evaluation = {
        "reference": path,
        "extractor": path,
        "samples": [path],
        "versions": {"of": path},
        path: 3,
        "seed": 0,
    }
    results = [{"metric": "fid", "name": path, "value": 2.5, "extractor": path}]
    (folder / "evaluation.json").write_text(json.dumps({**evaluation, "results": results}))
    card = build_card(folder, "user/model", "mit")
    sent = collect_upload(folder, card)["evaluation.json"].decode()
    assert not any(word in text for word in ("secret", "bob") for text in (card, sent))
    head = ModelCard(card).data
    assert head.datasets is None
    (result,) = head.eval_results
    assert (result.dataset_name, result.metric_name, result.metric_args) == (
        "local data",
        "fid",
        {"versions": {}, "seed": 0},
    )
    assert "| ema_decay | 0.9 |" in card and json.loads(sent)["results"] == [{"metric": "fid", "value": 2.5}]


def test_versions_are_listed_plainly(folder):
    versions = {"diffusers-dod": "0.1.0", "torch": "2.13.0+cpu"}
    evaluation = {"reference": "mnist", "versions": versions, "machine": {}, "seed": 0}
    results = [{"metric": "fid", "value": 2.5}]
    (folder / "evaluation.json").write_text(json.dumps({**evaluation, "results": results}))
    card = ModelCard(build_card(folder, "user/model", "mit"))
    assert "\nreference: mnist; versions: diffusers-dod 0.1.0, torch 2.13.0+cpu; seed: 0.\n" in card.text
    assert card.data.eval_results[0].metric_args["versions"] == versions  # in the head, as data


def test_a_name_that_is_a_folder_here_is_none_of_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = {"dataset_name": "my/pictures", "repa_encoder": "my-encoder", "preset": "S"}
    (folder / "training_config.json").write_text(json.dumps(training))
    assert ModelCard(build_card(folder, "user/model", "mit")).data.datasets == ["my/pictures"]
    for name in ("my/pictures", "my-encoder", "S"):
        (tmp_path / name).mkdir(parents=True)
    card = ModelCard(build_card(folder, "user/model", "mit"))
    assert card.data.datasets is None
    assert "my/pictures" not in card.content and "my-encoder" not in card.content and "| preset | S |" in card.text


@pytest.mark.parametrize("text", ["/home/bob/DiT", "~/DiT", "a/b/c", "../DiT", "two words"])
@pytest.mark.parametrize("argument", ["repo_id", "base_model", "datasets"])
def test_what_is_no_repository_is_refused(argument, text, folder):
    arguments = {"repo_id": "user/model", "license": "mit", "dry_run": True}
    with pytest.raises(ValueError, match="(?i)repo"):
        push_folder(folder, **arguments | {argument: [text] if argument == "datasets" else text})


def test_a_variant_of_another_precision_is_refused(folder):
    with pytest.raises(ValueError, match="`variant` is 'int8'; use 'fp16' or 'bf16'"):
        push_folder(folder, "user/model", license="mit", dry_run=True, variant="int8")


ODD = [
    "a```b",
    "`rm -rf`",
    "*bold* _and_ ~~struck~~",
    "<script>alert(1)</script>",
    "<!-- gone",
    "[x](javascript:alert(1))",
    "![x](https://example.com/x.png)",
    "a | b",
    "|---|",
    "two\nlines\n\n# Title",
    "x\n---\nlicense: other\n---\n",
    "a\r\n```\nb",
    "{{ 7 * 7 }} {% raw %}",
    "&lt;b&gt; &amp; co",
    "back\\slash \\| end\\",
    "quote \" and ' both",
    "colon: [yes, {no}] # comment",
    "$x^2$ $$y$$",
    "\u202eturned\u2028and\x07more",
]


def shown(markdown):
    """What a reader of escaped Markdown sees."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown))


def body_with(folder, text):
    """The card of a model whose class 0, settings and evaluation are called `text`: its head, and its Markdown's lines."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": {"0": text, "1": "dog"}}))
    (folder / "training_config.json").write_text(json.dumps({"setting": text, text: [text]}))
    evaluation = {"reference": text, "extractor": text, "results": [{"metric": text, "name": text, "value": 1.5}]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    card = ModelCard(build_card(folder, "user/model", "mit", has_picture=True))
    return card.data, card.text.splitlines()


def structure(lines):
    """What Markdown sees: where a line starts a block, and the number of cells in a table's row."""
    blocks = [line for line in lines if line.startswith(("#", "|", "```", "!", "<", "---", "===", "    "))]
    return [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) if line.startswith("|") else line for line in blocks]


@pytest.mark.parametrize("text", ODD)
def test_odd_names_stay_texts(text, folder):
    """The card keeps its shape and its head, and readers see the name."""
    _, plain = body_with(folder, "word")
    data, lines = body_with(folder, text)
    assert structure(lines) == structure(plain) and len(lines) == len(plain)
    assert set(data.to_dict()) == {"license", "library_name", "pipeline_tag", "tags", "model-index"}
    assert data.license == "mit" and data.eval_results[0].metric_type == text
    # Readers see the name, in which Markdown finds nothing.
    visible = "".join(character for character in " ".join(text.split()) if character.isprintable())
    (classes,) = [line for line in lines if line.startswith("Classes: ")]
    (setting,) = [line for line in lines if line.startswith("| setting | ") and line != "| setting | value |"]
    assert shown(classes) == f"Classes: {visible}; dog." and shown(setting) == f"| setting | {visible} |"
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]|~$<>]", classes)
    # The snippets are Python that draws class 0.
    snippets = re.findall(r"^```python\n(.*?)^```$", "\n".join(lines), flags=re.DOTALL | re.MULTILINE)
    assert len(snippets) == 2 and all("pipe(0, " in snippet for snippet in snippets)
    for snippet in snippets:
        compile(snippet, "card", "exec")


@pytest.mark.parametrize("name", ["tench", "Hüpfball", "跳跳球", "it's", "'''", "St. Bernard (dog)", "black-and-tan"])
def test_plain_names_are_in_the_snippets(name, folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": {"0": f"{name}, more", "1": "dog"}}))
    card = build_card(folder, "user/model", "mit")
    assert f"image = pipe({name!r}, num_stages=2)" in card and f"Classes: {name}, more; dog." in card


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("learning_rate", "learning_rate"),
        ("_private_ name_", r"\_private\_ name\_"),
        ("R&D <b>", "R&amp;D &lt;b&gt;"),
        ([1, "a|b"], r"\[1, 'a\|b'\]"),
        (0.5, "0.5"),
        ("👩\u200d🔬", "👩\u200d🔬"),
    ],
)
def test_escaping(text, escaped):
    assert escape_markdown(text) == escaped

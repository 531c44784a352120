"""All commands as somebody types them: their help, their options' spelling, and what a bad line is answered."""

import importlib
import os
import re
import subprocess
import sys

import pytest

import diffusers_dod
from diffusers_dod.__main__ import COMMANDS
from diffusers_dod.cli import BadData, BadInput, CommandError, Parser, bad_input, json_object, number, run
from diffusers_dod.training.train_codes import UNUSED


# What pip writes for `diffusers-dod`
CONSOLE_SCRIPT = "import sys; from diffusers_dod.__main__ import main; sys.exit(main())"
ROOMS = {command: f"diffusers_dod.{module.removesuffix('.__main__')}" for command, (module, _) in COMMANDS.items()}
# The shortest lines that are right
LEAST = {
    "train": ["--train_data_dir", "images", "--output_dir", "out", "--max_train_steps", "1", "--report_to", "none"],
    "train-codes": ["model", "--train_data_dir", "images", "--output_dir", "out", "--max_train_steps", "1"],
    "cache": ["--train_data_dir", "images", "--output_dir", "out", "--vae_name_or_path", "vae"],
    "sample": ["--model", "model", "--output_dir", "out"],
    "evaluate": ["--samples", "samples", "--reference", "reference"],
    "probe": ["--model", "model", "--train_data_dir", "images"],
    "convert": ["sit", "model.pt", "out"],
    "hub": ["push", "model", "user/model"],
    "viz": ["--model", "model", "--output_dir", "out"],
}
HELPS = [[command] for command in COMMANDS] + [["hub", "check"], ["hub", "push"]]


def ended(*command, **environment):
    environment = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def outcome(*command):
    done = ended(*command)
    return done.returncode, done.stdout, done.stderr


def parse(command, *arguments):
    return importlib.import_module(f"diffusers_dod.{COMMANDS[command][0]}").parse_args([*LEAST[command], *arguments])


@pytest.fixture(scope="module")
def helps():
    """The help of every command, each of a process of its own that says at its end whether it imported torch."""
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
    return {" ".join(words): ended("-c", code + CONSOLE_SCRIPT, *words, "--help") for words in [[], *HELPS]}


# --- help


@pytest.mark.parametrize("words", ["", *map(" ".join, HELPS)])
def test_help_works_without_importing_torch(helps, words):
    done = helps[words]
    assert done.returncode == 0 and done.stderr == "False\n", done.stderr
    assert done.stdout.startswith(f"usage: diffusers-dod {words}".rstrip())


def test_the_commands_are_listed_with_what_they_do(helps):
    for command, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(text)}$", helps[""].stdout, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_keeps_the_lines_of_the_examples(helps, command):
    """Each of them starts with what the command is called."""
    examples = re.findall(r"^    (diffusers-dod .+)$", helps[command].stdout, re.MULTILINE)
    assert examples and all(example.startswith(f"diffusers-dod {command} ") for example in examples)


@pytest.mark.parametrize("command", [command for command in LEAST if command not in ("convert", "hub")])
def test_help_names_every_default(helps, command):
    """`convert` and `hub` have none but what the next test looks for."""
    entries = re.split(r"^  (?=--)", helps[command].stdout, flags=re.MULTILINE)
    entries = {re.match(r"--(\w+)", entry)[1]: " ".join(entry.split()) for entry in entries[1:]}
    args, count = vars(parse(command)), 0
    if command == "train-codes":  # what it needs, and what only `train` lets one choose
        args = {name: value for name, value in args.items() if name not in ("pipeline", *UNUSED)}
    assert entries.keys() == args.keys()
    for name, value in args.items():
        # What is off or `None` says itself what that means, and so do options that are settled with others.
        off = value is None or value is False or value == []
        settled = name in ("train", "stages", "metrics", "report_to") or (
            command == "train" and name in ("train_batch_size", "max_train_steps")
        )
        if not off and f"--{name}" not in LEAST[command] and not settled:
            plain = " ".join(map(str, value)) if isinstance(value, list) else value
            assert f"(default: {plain})" in entries[name]
            count += 1
        assert not off or "(default: " not in entries[name]
    assert count >= 3


def test_help_tells_what_happens_without_an_option(helps):
    """Of those whose default the command finds out itself."""
    for words, needed in {
        "convert": ("default: the checkpoint's, or 32", "the checkpoint's, or 4", "default: REPA-E's own, or none"),
        "viz": ("default: the first 10", "default: one more than the pipeline's, so 3, or 2 from codes"),
        "hub push": ("default: main",),
        "evaluate": ("default: all",),
        "demo": ("DOD_MODEL",),
    }.items():
        text = " ".join(helps[words].stdout.split())
        assert all(part in text for part in needed), words


def test_a_switch_that_turns_something_off_has_no_default(helps):
    entry = helps["hub push"].stdout.partition("\n  --no-code")[2].partition("\n  --")[0]
    assert entry and "default" not in entry


@pytest.mark.parametrize("words", ["", *map(" ".join, HELPS)])
def test_help_describes_its_command_in_lines_of_at_most_120_characters(helps, words):
    usage, description, *_ = helps[words].stdout.split("\n\n")
    assert not description.startswith(("options:", "positional arguments:"))
    assert max(map(len, helps[words].stdout.removeprefix(usage).splitlines())) <= 120


# --- spelling


@pytest.mark.parametrize("command", LEAST)
def test_hyphens_and_underscores_are_the_same(helps, command):
    words = "hub push" if command == "hub" else command
    options = set(re.findall(r"(?<=[ \[])--[a-z][\w-]+", helps[words].stdout.partition("\n\n")[0]))
    assert options
    hyphens = [word.replace("_", "-") if word.startswith("--") else word for word in LEAST[command]]
    expected = parse(command)
    assert importlib.import_module(f"diffusers_dod.{COMMANDS[command][0]}").parse_args(hyphens) == expected


def test_hyphens_and_underscores_with_values_and_switches():
    for arguments in (
        ["--num_images", "3", "--guidance_interval", "0.1", "0.9", "--no-npz"],
        ["--num-images=3", "--guidance-interval", "0.1", "0.9", "--no_npz"],
    ):
        args = parse("sample", *arguments)
        assert (args.num_images, args.guidance_interval, args.npz) == (3, [0.1, 0.9], False)
    assert parse("train", "--random-flip").random_flip is True
    for spelling in ("--no-random-flip", "--no_random_flip", "--no-random_flip"):
        assert parse("train", "--random_flip", spelling).random_flip is False
    # What is no option's name stays as it is.
    assert parse("sample", "--revision", "my-own_branch").revision == "my-own_branch"
    assert parse("sample", "--revision=my-own_branch").revision == "my-own_branch"


# --- bad lines


@pytest.mark.parametrize(
    "words, message",
    [
        (
            [],
            "diffusers-dod: error: choose one of train, train-codes, cache, sample, evaluate, probe, convert, hub, "
            "viz, demo",
        ),
        (["trian"], "diffusers-dod: error: choose one of .*, not 'trian'"),
        (["--nonsense"], "diffusers-dod: error: unrecognized arguments: --nonsense"),
        (["hub"], "diffusers-dod hub: error: the following arguments are required: command"),
        (["hub", "pull"], "diffusers-dod hub: error: argument command: invalid choice: 'pull'.*"),
        *(
            ([command, *LEAST.get(command, []), "--nonsense"], f"diffusers-dod {command}: error: .*--nonsense")
            for command in COMMANDS
        ),
        (["viz", "--model", "x"], "diffusers-dod viz: error: the following arguments are required: --output_dir"),
        (
            ["sample", *LEAST["sample"], "--num_im", "3"],
            "diffusers-dod sample: error: .*--num_im.*",
        ),  # no abbreviations
        (
            ["sample", *LEAST["sample"], "--seed", "x"],
            "diffusers-dod sample: error: argument --seed: invalid int value: 'x'",
        ),
        (["demo"], "diffusers-dod demo: error: no model: pass --model, or set DOD_MODEL to .*"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_a_bad_line_is_answered_in_one_and_ends_with_status_2(words, message):
    done = (
        ended("-c", CONSOLE_SCRIPT, *words, DOD_MODEL="") if words != ["demo"] else ended("-c", CONSOLE_SCRIPT, *words)
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(message + "\n", done.stderr), done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_three_ways_to_start_a_command_do_the_same(helps, command):
    expected = outcome("-c", CONSOLE_SCRIPT, command, "--nonsense")
    assert expected[0] == 2
    assert outcome("-m", "diffusers_dod", command, "--nonsense") == expected
    assert outcome("-m", ROOMS[command], "--nonsense") == expected
    assert outcome("-m", ROOMS[command], "--help")[:2] == (0, helps[command].stdout)


def test_version():
    assert outcome("-m", "diffusers_dod", "--version") == (0, f"diffusers-dod {diffusers_dod.__version__}\n", "")


# --- the kit


def test_how_a_command_ends(capsys, monkeypatch):
    def main(error=None, status=None):
        def command(argv):
            if error is not None:
                raise error
            return status

        return run(command, "prog", []), capsys.readouterr().err

    assert main() == (0, "") and main(status=3) == (3, "")
    assert main(BadInput("so")) == (2, "prog: error: so\n") and main(CommandError("so")) == (1, "prog: error: so\n")
    assert main(FileNotFoundError(2, "No such file", "x")) == (2, "prog: error: [Errno 2] No such file: 'x'\n")
    assert main(ConnectionError("first\nsecond")) == (2, "prog: error: first\n")
    assert main(KeyboardInterrupt()) == (130, "")
    with pytest.raises(ValueError):  # a fault of ours keeps its traceback
        main(ValueError("so"))
    # Of several processes the first speaks for all, but of what one of them met
    monkeypatch.setenv("RANK", "1")
    assert main(BadInput("so")) == (2, "") and main(BadData("so")) == (2, "prog: error: so\n")
    assert main(OSError("so")) == (2, "prog: error: so\n")


def test_bad_input_takes_the_first_line_and_leaves_other_errors_alone():
    with pytest.raises(BadInput, match="^--vae: first$"), bad_input(what="--vae"):
        raise ValueError("first\nsecond")
    with pytest.raises(BadInput, match="^KeyError$"), bad_input(KeyError):
        raise KeyError
    with pytest.raises(KeyError), bad_input():
        raise KeyError("x")
    with pytest.raises(BadData), bad_input(Exception):
        raise BadData("kept as it is")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "inf", "nan", "x"])
def test_numbers_out_of_range(text):
    parser = Parser(prog="prog")
    parser.add_argument("--count", type=number(int, 1))
    parser.add_argument("--share", type=number(float, 0, 1))
    with pytest.raises(BadInput, match="--count"):
        parser.parse_args([f"--count={text}"])
    if text not in ("0",):
        with pytest.raises(BadInput, match="--share"):
            parser.parse_args([f"--share={text}"])


@pytest.mark.parametrize("command", ["train", "train-codes", "sample", "evaluate", "probe", "viz"])
def test_seeds_are_those_that_every_library_takes(command):
    assert parse(command, "--seed", str(2**32 - 1)).seed == 2**32 - 1
    for seed in (-1, 2**33, 2**64, 10**30):
        with pytest.raises(BadInput, match=f"--seed: {seed} is not from 0 to {2**32 - 1}"):
            parse(command, f"--seed={seed}")


def test_a_json_object_in_the_line_or_in_a_file(tmp_path):
    parser = Parser(prog="prog")
    parser.add_argument("--config", type=json_object)
    (tmp_path / "config.json").write_text('{"a": 1, "_class_name": "X"}')
    for text in ('{"a": 1}', str(tmp_path / "config.json")):
        assert parser.parse_args(["--config", text]).config == {"a": 1}
    for text in ("[1]", "{", str(tmp_path / "none.json")):
        with pytest.raises(BadInput, match="is neither a JSON object nor a file with one"):
            parser.parse_args(["--config", text])

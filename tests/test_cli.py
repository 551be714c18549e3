"""Promises of the command line: what it prints, how it fails, that nothing is left half done."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from spectral_window import SWHConfig, SWHForCausalLM, commands
from spectral_window.cli import main, program, spread_lists
from spectral_window.cli.errors import explain
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.generation.session import Session
from spectral_window.ops.window import window_attention
from spectral_window.training.loading import load
from tests.processes import python

END = 256
PROSE = "The cat sat on the mat. A dog ran by, and the cat ran up the tree. What a day!\n\n"


def save_model(folder: Path, seed: int = 0, **changes) -> Path:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "window": 4,
        "initializer_range": 0.3,
        "bos_token_id": END,
        "eos_token_id": END,
    }
    SWHForCausalLM(SWHConfig(**{**fields, **changes})).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("cli") / "a model"))


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prose")
    for name in "abcd":
        (folder / f"{name}.txt").write_text(f"Story {name}. " + PROSE * 30)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prose) -> Path:
    """A run folder as `train` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    overrides = ["tokenizer=bytes", "hidden_size=16", "steps=4", "warmup_steps=1", "save_every=2"]
    assert main(["train", "tiny", *overrides, "--data", str(prose), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(capfdbinary):
    """Run a command line here; (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfdbinary.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return call


def process(*arguments: object, **options) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return python("-m", "spectral_window", *arguments, **{**pipes, **options})


def assert_one_line(err: str) -> None:
    assert re.fullmatch(r"spectral-window: error: [^\n]+\n", err), err


# ------------------------------------------------------------------------------- usage


COMMANDS = program.command_names()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, run):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert "--debug" in out
    for parameter in program.load_command(command).params:
        for name in parameter.opts:
            if name.startswith("--"):
                assert name in out
        assert getattr(parameter, "help", None), f"{command} {parameter.name} has no help"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_parses(command, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parsed = program.load_command(command)
    assert parsed.epilog.startswith(f"Example: spectral-window {command} ")
    assert run(command, "--help")[1].strip().splitlines()[-1].strip() == parsed.epilog
    words = shlex.split(parsed.epilog.removeprefix("Example: spectral-window "))
    monkeypatch.setattr(program.Command, "invoke", lambda _, context: print(context.params))
    assert run(*words)[::2] == (0, "")


HELLO = '''
"""`spectral-window hello`: greets."""
from typing import Annotated
import typer
from spectral_window.cli.options import Debug, Json

EXAMPLE = "hello --name you"

def run(
    name: Annotated[str, typer.Option(help="Whom to greet.")] = "world",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Greet somebody."""
    print(f"hello {name}")
'''


def test_a_new_command_is_one_file(tmp_path, monkeypatch, run):
    (tmp_path / "hello.py").write_text(HELLO)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    assert program.command_names() == [*COMMANDS, "hello"]
    assert run("hello", "--name", "you") == (0, "hello you\n", "")
    assert run("hallo")[2].endswith("did you mean 'hello'?\n")
    code, out, _ = run("hello", "--help")
    assert code == 0
    for text in ("Greet somebody.", "Whom to greet.", "Print one JSON object", "hello --name you"):
        assert text in out
    assert "Greet somebody." in run("--help")[1]


def test_help_and_usage_errors_do_not_wait_for_torch():
    code = (
        "import sys; from spectral_window.cli import main\n"
        "codes = main(['--help']), main(['train', '--hlp']), main(['--version'])\n"
        "assert codes == (0, 2, 0), codes\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_command_shows_the_help(run):
    code, out, _ = run()
    assert code == 0
    assert "generate" in out


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"spectral-window \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian tiny", "no such command 'trian' (spectral-window): did you mean 'train'?"),
        ("--verion", "did you mean '--version'?"),
        ("train", "missing argument 'RECIPE' (spectral-window train): see"),
        ("train tiny --dta x", "did you mean '--data'?"),
        ("train tiny --data", "'--data' requires an argument"),
        ("train tinny", "did you mean 'tiny'?"),
        ("train tiny widow=3", "did you mean 'window'?"),
        ("train tiny window", "key=value"),
        ("train tiny steps=many", "steps=many (recipe): expected a whole number"),
        ("train tiny --resume --overwrite", "--resume and --overwrite"),
        ("generate", "missing argument 'MODEL'"),
        ("generate m x --temprature 1", "did you mean '--temperature'?"),
        ("generate m x --top-k abc", "'--top-k'"),
        ("generate m x y", "unexpected extra argument"),
        ("generate m", "the prompt is empty (PROMPT): give text, or --unconditional"),
        ("generate m x --unconditional", "more than one beginning"),
        ("generate m x --prompt-file f", "more than one beginning"),
        ("generate m --prompt-file no-such.txt", "no such text file (no-such.txt)"),
        ("generate m --prompt-file /dev/zero", "no such text file (/dev/zero)"),
        ("generate m x --temperature -1", "temperature is -1.0"),
        ("generate m x --temperature nan", "temperature is nan"),
        ("generate m x --top-p 0", "top_p is 0.0"),
        ("generate m x --top-p 1.1", "top_p is 1.1"),
        ("generate m x --top-k -1", "top_k is -1"),
        ("generate m x -n -5", "max_new_tokens is -5"),
        ("generate m x -n 1000000000000", "max_new_tokens is 1000000000000"),
        ("generate m x --threads 0", "'--threads'"),
        ("generate m x", "no such folder (m)"),
        ("generate http://host/m x", "a URL is not a model"),
        ("generate m x --save-session no/such/folder/f", "no such folder (no/such/folder)"),
        ("generate m x --device cuda:9", "no device 'cuda:9' (device): this machine has cpu"),
        ("generate m x --device toaster", "no device 'toaster'"),
        ("eval m --data no-such.txt", "(no-such.txt)"),
        ("eval m --max-tokens 0", "'--max-tokens'"),
        ("eval m", "no text to measure on (m)"),
        ("info tinny", "did you mean 'tiny'?"),
        ("info no/such", "no such folder (no/such)"),
        ("info tiny widow=3", "did you mean 'window'?"),
        ("info tiny --context -1", "'--context'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(line, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*line.split())
    assert message in err
    assert (code, out) == (2, "")
    assert_one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_empty_and_endless_stop_strings_are_refused(run, model):
    for stop in ([""], ["x" * 10_000], ["a"] * 1000):
        flags = [word for text in stop for word in ("--stop", text)]
        code, out, err = run("generate", model, "x", *flags)
        assert (code, out) == (2, "")
        assert_one_line(err)


def test_data_takes_a_list_as_a_shell_expands_it():
    line = [
        "train",
        "tiny",
        "--data",
        "a.txt",
        "b.txt",
        "steps=3",
        "--valid",
        "c",
        "d",
        "--out",
        "o",
    ]
    spread = ["--data", "a.txt", "--data", "b.txt", "steps=3", "--valid", "c", "--valid", "d"]
    assert spread_lists(line) == ["train", "tiny", *spread, "--out", "o"]
    assert spread_lists(["generate", "m", "--", "--data", "x", "y"])[-3:] == ["--data", "x", "y"]


def test_a_file_named_like_a_knob_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b.txt").touch()
    assert spread_lists(["--data", "x", "a=b.txt", "steps=3"])[2:] == [
        "--data",
        "a=b.txt",
        "steps=3",
    ]


# ------------------------------------------------------------------------------- failing


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "f"), 5, "(f): make room"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 5, "check the path"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (a bug)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_of_the_system_and_of_ours_have_their_exit_codes(error, code, message):
    line, got = explain(error)
    assert got == code
    assert message in line
    assert "\n" not in line


def test_a_value_error_of_our_own_is_for_the_user():
    x = torch.zeros(1, 2, 1, 2)
    with pytest.raises(ValueError, match="window is 0") as caught:
        window_attention(x, x, x, window=0)
    assert explain(caught.value) == (str(caught.value), 2)


def test_debug_adds_the_traceback(run):
    code, _, err = run("generate", "no-such", "x", "--debug")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("spectral-window: error: no such folder (no-such)")


def test_control_characters_in_an_error_are_shown_not_obeyed(run):
    code, _, err = run("generate", "no\x1b[2Jsuch\nmodel", "x")
    assert code == 2
    assert_one_line(err)
    assert "\x1b" not in err


# ------------------------------------------------------------------------------- which model


def test_a_model_is_found_in_a_run_folder_or_by_itself(trained, model, monkeypatch):
    assert load(trained).folder == trained / "model"
    assert load(trained / "model").folder == trained / "model"
    assert load(model).folder == Path(model)
    monkeypatch.setenv("HOME", str(trained.parent))
    assert load("~/tiny").folder == trained / "model"


def test_an_unfinished_run_gives_its_newest_intact_checkpoint_and_says_so(trained, tmp_path, run):
    unfinished = tmp_path / "run"
    shutil.copytree(trained, unfinished)
    shutil.rmtree(unfinished / "model")
    steps = sorted(path.name for path in (unfinished / "checkpoints").iterdir())
    assert load(unfinished).folder.name == steps[-1]
    weights = unfinished / "checkpoints" / steps[-1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    assert load(unfinished).folder.name == steps[-2]
    code, out, err = run("generate", unfinished, "x", "-n", 2)
    assert code == 0
    assert out.startswith("x")
    assert f"warning: checkpoint {steps[-1]} is refused" in err
    for step in steps:
        (unfinished / "checkpoints" / step / "manifest.json").unlink()
    code, out, err = run("generate", unfinished, "x")
    assert (code, out) == (3, "")
    assert_one_line(err)


def edit_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


HEAD = "lm_head.weight"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def named_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


def linked_away(folder: Path) -> None:
    away = folder.parent / "away.safetensors"
    (folder / "model.safetensors").rename(away)
    (folder / "model.safetensors").symlink_to(away)


def index_away(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {HEAD: "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), 3, "copy it again"),
    "only a pickle": (only_pickle, 3, "pytorch_model.bin is not safetensors"),
    "a pickle in disguise": (named_safetensors, 3, "not safetensors"),
    "truncated": (truncated, 3, "not safetensors, or damaged"),
    "link away": (linked_away, 3, "outside the folder"),
    "index away": (index_away, 3, "outside the folder"),
    "tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(HEAD)), 3, f"{HEAD} missing",
    ),
    "tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update(x=torch.zeros(1))), 3, "x unexpected",
    ),
    "tensor of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({HEAD: torch.zeros(3, 32)})),
        3, f"{HEAD} is [3, 32], not [257, 32]",
    ),
    "tensor not finite": (
        lambda f: edit_tensors(f, lambda t: t[HEAD].fill_(math.nan)),
        3, f"not finite ({{}}): {HEAD}",
    ),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), 3, "not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), 3, "not a JSON object"),
    "config is huge": (
        lambda f: (f / "config.json").write_text(" " * (2 << 20)), 3, "larger than 1 MB",
    ),
    "config nests deeply": (lambda f: (f / "config.json").write_text("[" * 100_000), 3, "not JSON"),
    "config of another kind": (
        lambda f: edit_json(f / "config.json", model_type="llama"), 2, "model_type is 'llama'",
    ),
    "config with a misspelt key": (
        lambda f: edit_json(f / "config.json", windw=8), 2, "did you mean 'window'?",
    ),
    "config with a bad value": (lambda f: edit_json(f / "config.json", window=0), 2, "window is 0"),
    "config of a model that no machine holds": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=10**6), 5,
        "use fewer, at most 10,000 layers and 1e+15 parameters [{}/config.json]",
    ),
    "heads that do not divide": (
        lambda f: edit_json(f / "config.json", num_attention_heads=3), 2, "3",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), 2, "no model in the folder"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), 2, "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_refused_with_its_reason(name, tmp_path, run):
    damage, code, message = DAMAGE[name]
    folder = save_model(tmp_path / "model")
    damage(folder)
    got, out, err = run("generate", folder, "x")
    assert message.format(folder) in err
    assert (got, out) == (code, "")
    assert_one_line(err)


# ------------------------------------------------------------------------------- generate


def test_generate_prints_the_prompt_and_the_sessions_own_text(model, run):
    loaded = load(model)
    session = Session(loaded.model, loaded.tokenizer, seed=5)
    session.feed("héllo")
    expected = "".join(session.stream(40, temperature=0.9, top_k=50, top_p=0.9))
    flags = ["-n", 40, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--seed", 5]
    assert run("generate", model, "héllo", *flags) == (0, "héllo" + expected, "")
    assert run("generate", model, "héllo", *flags, "--no-echo") == (0, expected, "")


def test_no_new_tokens_print_the_prompt_only(model, run):
    assert run("generate", model, "just this", "-n", 0) == (0, "just this", "")


def test_a_prompt_file_is_read_as_training_reads_text(model, run, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffline 1\r\nline 2".encode())
    plain = run("generate", model, "line 1\nline 2", "-n", 9, "--seed", 1)
    assert plain[0] == 0
    assert (
        run("generate", model, "--prompt-file", tmp_path / "p.txt", "-n", 9, "--seed", 1) == plain
    )
    (tmp_path / "p.txt").write_bytes(b"good \xff bad")
    code, out, err = run("generate", model, "--prompt-file", tmp_path / "p.txt")
    assert (code, out) == (2, "")
    assert "not UTF-8 at byte 5" in err
    (tmp_path / "p.txt").write_bytes(b"")
    assert run("generate", model, "--prompt-file", tmp_path / "p.txt")[0] == 2


def test_unconditional_begins_as_training_texts_begin(model, run):
    loaded = load(model)
    session = Session(loaded.model, loaded.tokenizer, seed=5)
    session.feed([END])
    expected = "".join(session.stream(20))
    shown = run("generate", model, "--unconditional", "-n", 20, "--seed", 5)
    assert shown == (0, expected, "")


def test_a_stop_string_may_be_a_new_line(model, run):
    _, whole, _ = run("generate", model, "x", "-n", 200, "--seed", 2, "--ignore-eos")
    mark = whole[30:32]
    stopped = run(
        "generate",
        model,
        "x",
        "-n",
        200,
        "--seed",
        2,
        "--ignore-eos",
        "--stop",
        mark,
        "--stop",
        "\\n",
    )[1]
    places = [at for at in (whole.find(mark, 1), whole.find("\n", 1)) if at > 0]
    assert stopped == whole[: min(places)]


def test_typed_special_tokens_are_text(model, run):
    code, out, _ = run("generate", model, "a<|endoftext|>b", "-n", 0)
    assert (code, out) == (0, "a<|endoftext|>b")


def test_a_session_goes_on_in_another_process_with_exactly_its_text(model, tmp_path, run):
    flags = ["--seed", 3, "--ignore-eos"]
    _, whole, _ = run("generate", model, "once upon", "-n", 60, *flags)
    kept = tmp_path / "talk.session"
    child = process("generate", model, "once upon", "-n", 37, *flags, "--save-session", kept)
    first, errors = child.communicate()
    assert (child.returncode, errors) == (0, b"")
    code, rest, errors = run("generate", model, "-n", 23, "--ignore-eos", "--session", kept)
    assert (code, errors) == (0, "")
    assert first.decode() + rest == whole


def test_a_session_takes_new_input_and_saves_to_the_same_file(model, tmp_path, run):
    kept = tmp_path / "s"
    assert run("generate", model, "one", "-n", 5, "--seed", 1, "--save-session", kept)[0] == 0
    loaded = load(model)
    session = Session.load(kept, loaded.model, loaded.tokenizer)
    session.feed(" two")
    expected = "".join(session.stream(8, finish=False))
    shown = run("generate", model, " two", "-n", 8, "--session", kept, "--save-session", kept)
    assert shown == (0, " two" + expected, "")
    assert Session.load(kept, loaded.model, loaded.tokenizer).tokens_seen == session.tokens_seen


def test_a_session_of_another_model_or_no_session_is_refused(model, tmp_path, run):
    other = save_model(tmp_path / "other", seed=9)
    kept = tmp_path / "s"
    run("generate", other, "x", "-n", 3, "--save-session", kept)
    for path, code, message in (
        (kept, 3, "another model"),
        (tmp_path / "other" / "model.safetensors", 3, "not a session"),
        (tmp_path / "nothing", 2, "no session file"),
    ):
        got, out, err = run("generate", model, "-n", 3, "--session", path)
        assert (got, out) == (code, "")
        assert message in err
        assert_one_line(err)


def said(errors: bytes) -> list[bytes]:
    """The lines of stderr, without the one that the first call on a machine adds."""
    return [line for line in errors.splitlines() if b"compiling loops" not in line]


def test_ctrl_c_keeps_the_session_and_exits_130(model, tmp_path, run):
    kept = tmp_path / "s"
    flags = ["--ignore-eos", "-n", 10**8, "--seed", 1, "--save-session", kept]
    child = process("generate", model, "go", *flags)
    head = child.stdout.read(40)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate()
    assert child.returncode == 130
    assert said(errors) == [b"spectral-window: error: interrupted"]
    shown = (head + rest).decode()
    # It goes on from the very token at which it was stopped.
    code, more, _ = run("generate", model, "-n", 20, "--ignore-eos", "--session", kept)
    assert code == 0
    long = run("generate", model, "go", "-n", len(shown) + 100, "--ignore-eos", "--seed", 1)[1]
    assert long.startswith(shown + more.rstrip("\ufffd"))


def test_a_closed_pipe_ends_it_quietly(model):
    child = process("generate", model, "go", "--ignore-eos", "-n", 10**8)
    assert child.stdout.read(5)
    child.stdout.close()
    assert child.wait() == 141
    assert not said(child.stderr.read())
    child.stderr.close()


def test_stdin_and_a_terminal_that_knows_ascii_only(model):
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    child = process("generate", model, "-", "-n", 0, stdin=subprocess.PIPE, env=environment)
    out, err = child.communicate("wörld 世界".encode())
    assert (child.returncode, err) == (0, b"")
    assert out == rb"w\xf6rld \u4e16\u754c"


# ------------------------------------------------------------------------------- eval, info, train


def test_eval_of_a_run_is_its_own_held_out_result(trained, run):
    result = json.loads((trained / "result.json").read_text())
    code, out, err = run("eval", trained, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["length"] == 64
    assert shown["loss"] == pytest.approx(result["eval_loss"], abs=1e-4)
    assert shown["bits_per_byte"] == pytest.approx(result["bits_per_byte"], abs=1e-4)
    assert shown["perplexity"] == pytest.approx(math.exp(shown["loss"]))


def test_eval_measures_all_of_the_given_text(trained, prose, run):
    """By hand: every document after its separator, blocks of T, nats over bytes."""
    code, out, _ = run("eval", trained, "--data", prose / "a.txt", prose / "b.txt", "--json")
    assert code == 0
    shown = json.loads(out)
    texts = [(prose / name).read_bytes() for name in ("a.txt", "b.txt")]
    stream = torch.tensor([token for text in texts for token in (END, *text)])
    assert shown["bytes"] == sum(map(len, texts))
    assert shown["tokens"] == len(stream) - 1
    assert shown["documents"] == 2
    model = load(trained).model
    nats = 0.0
    begin = 1 + len(texts[0])
    for start in range(0, len(stream) - 1, 64):
        block = stream[start : start + 65]
        inputs = block[:-1]
        position = torch.arange(start, start + len(inputs))
        restart = torch.where(position >= begin, begin, 0).clamp(min=start)
        with torch.no_grad():
            logits = model(inputs[None], position_ids=(position - restart)[None]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
    assert shown["loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    bits = nats / math.log(2) / sum(map(len, texts))
    assert shown["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_eval_prints_a_table(trained, run):
    code, out, _ = run("eval", trained, "--max-tokens", 128)
    assert code == 0
    assert "bits per byte" in out
    assert "128 predicted" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", b"caf\xe9", "latin.txt"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("pic.png", b"\x89PNG", "pic.png"),
    ],
)
def test_eval_of_bad_text_is_refused(name, content, message, trained, run, tmp_path):
    (tmp_path / name).write_bytes(content)
    code, out, err = run("eval", trained, "--data", tmp_path / name)
    assert (code, out) == (2, "")
    assert message in err
    assert_one_line(err)


def test_info_counts_what_the_model_counts(model, run):
    code, out, err = run("info", model, "--context", 10, "--context", 100_000, "--json")
    assert (code, err) == (0, "")
    shown, own = json.loads(out), load(model).model
    assert shown["parameters"] == own.count_parameters()
    small, large = shown["contexts"]
    assert small["state_bytes"] == large["state_bytes"] == own.state_bytes(10)
    assert large["transformer_state_bytes"] == 10_000 * small["transformer_state_bytes"]
    assert large["flops_per_token"] == own.flops_per_token(100_000)
    assert {row["op"] for row in shown["methods"]} == {"spectral", "window", "linear", "rms_norm"}
    assert all(row["reason"] for row in shown["methods"])
    assert shown["environment"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("recipe", ["demo", "tiny", "small", "memory", "paper-lm"])
def test_info_of_a_recipe_needs_no_model(recipe, run):
    code, out, err = run("info", recipe, "window=16", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["config"]["window"] == 16


def test_info_prints_tables_for_a_transformer_too(run):
    code, out, _ = run("info", "tiny", "mixer=attention")
    assert code == 0
    assert "sdpa" in out
    assert "1,048,576" in out


def test_train_writes_a_run_and_its_own_command(trained, prose):
    config = json.loads((trained / "config.json").read_text())
    assert config["command"].startswith("spectral-window train tiny tokenizer=bytes")
    assert config["recipe"]["data"] == [str(prose)]
    assert (trained / "result.json").is_file()


def test_train_refuses_a_used_folder_and_leaves_it(trained, prose, run):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    code, _, err = run("train", "tiny", "--data", prose, "--out", trained)
    assert code == 2
    assert "--resume or --overwrite" in err
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.parametrize("bad", ["window=0", "num_attention_heads=3", "tokenizer=wat"])
def test_train_that_cannot_begin_leaves_no_folder(bad, prose, run, tmp_path):
    code, _, err = run("train", "tiny", "--data", prose, bad, "--out", tmp_path / "run")
    assert code == 2
    assert_one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_resume_ends_with_the_result_it_has(trained, prose, run):
    overrides = ["tokenizer=bytes", "hidden_size=16", "steps=4", "warmup_steps=1", "save_every=2"]
    arguments = ["train", "tiny", *overrides, "--data", prose, "--out", trained, "--resume"]
    before = (trained / "model" / "model.safetensors").read_bytes()
    assert run(*arguments)[0] == 0
    assert (trained / "model" / "model.safetensors").read_bytes() == before
    code, _, err = run(*arguments, "lr=0.5")
    assert code == 3
    assert "lr" in err


def test_demo_will_not_touch_a_file(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = run("demo", "--out", tmp_path / "file")
    assert code == 2
    assert_one_line(err)
    assert (tmp_path / "file").read_text() == "mine"

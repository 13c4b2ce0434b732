"""What happens before torch is imported: --help and wrong options at once, output to any terminal or pipe, Ctrl-C; and
what of a checkpoint's options holds in another folder."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from common import UsageError, options, runtime
from common.options import option
from conftest import ROOT

SCRIPTS = ("onenip", "omniad", "roads", "cada")


@dataclasses.dataclass
class Args(options.Options):
    width: int = option(8, "width", group="model", low=1)
    weights: str = option("", "file of weights", group="model")


PRESETS = {"paper": {}, "laptop": {"width": 2}}


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["method.py"])


def parse(*words):
    return options.parse(Args, PRESETS, "One line.\n\nMore.", [str(word) for word in words], method="method")


@pytest.fixture
def small_script(tmp_path):
    """A script like ours, whose import of torch takes 60 s: whoever waits for it has waited in vain."""
    path = tmp_path / "small.py"
    path.write_text(textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from dataclasses import dataclass
        from common.options import Options, before_torch, option

        @dataclass
        class Args(Options):
            width: int = option(8, "width × height, γ", group="model", low=1)

        before_torch(Args, {{"paper": {{}}, "laptop": {{}}}}, "A method of naïve Möbius.")
        assert "torch" not in sys.modules
        print("importing", flush=True)
        import time
        time.sleep(60)
    """), encoding="utf-8")
    return path


def answer(words, **more):
    """(exit status, stdout, stderr) of a Python process."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, timeout=50, **more)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_what_it_is_and_imports_nothing_heavy(script):
    """The docstring's first line, then how it is called with three examples, then the options; torch stays out."""
    text = f"import sys, runpy\nsys.argv = ['{script}.py', '--help']\n" + textwrap.dedent(f"""
        try:
            runpy.run_path('{script}.py', run_name='__main__')
        finally:
            print('heavy:', sorted({{'torch', 'numpy', 'scipy', 'PIL'}} & sys.modules.keys()))
    """)
    status, out, err = answer(["-c", text], cwd=ROOT)
    lines = out.decode().splitlines()
    assert (status, err, lines[-1]) == (0, b"", "heavy: []")
    first = (ROOT / f"{script}.py").read_text().split("\n")[0].strip('"')
    assert lines[0] == first and lines[2].startswith(f"usage: {script}.py")
    examples = [line for line in lines[:12] if line.startswith(f"  {script}.py")]
    assert len(examples) == 3 and lines.index("data:") > lines.index(examples[-1])


@pytest.mark.parametrize("words, named", [
    ("--widht 3", "--widht"), ("--width 0", "--width 0"), ("--threads many", "--threads many"),
    ("--threads 0", "--threads"), ("--predict x.png", "--eval"),
    ("--eval nowhere.pt", "nowhere.pt"), ("--resume --out nowhere", "nowhere"),
    ("--holdout 1.5", "--holdout"), ("--threshold 3", "--predict"), ("--eval .", "is a folder"),
    (f"--seed {2**70}", "--seed"), (f"--threads {10**23}", "--threads"), ("--threads 3000", "--threads"),
    (f"--batch-size {10**24}", "--batch-size"), ("--holdout inf", "finite"), ("--holdout nan", "finite"),
    ("--out=", "--out"), ("--eval=", "--eval"), ("--data=", "--data")])
def test_wrong_options_are_answered_before_torch(words, named, small_script):
    status, out, err = answer([small_script, *words.split()], cwd=small_script.parent)
    assert (status, out, err.count(b"\n")) == (2, b"", 1)
    assert err.startswith(b"small.py: ") and named.encode() in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_help_in_every_code_page(encoding, small_script):
    """Signs that the code page lacks are written as numbers; the others as they are."""
    status, out, err = answer([small_script, "--help"], env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (status, err) == (0, b"")
    assert "width × height, γ".encode(encoding, "backslashreplace") in out
    assert "naïve Möbius".encode(encoding, "backslashreplace") in out


@pytest.mark.parametrize("words, status", [(["--help"], 0), (["--widht", "3"], 2)])
def test_nobody_reads(words, status, small_script):
    """`| head -1`: a pipe that is closed already, for stdout and stderr; no traceback, the status stays."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, small_script, *words], stdout=write, stderr=subprocess.PIPE, timeout=50)
    assert done.returncode == status and b"Error" not in done.stderr and b"Traceback" not in done.stderr
    done = subprocess.run([sys.executable, small_script, *words], stdout=write, stderr=write, timeout=50)
    os.close(write)
    assert done.returncode == status


@pytest.mark.parametrize("words, status", [("--help", 0), ("--widht 3", 2)])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_nobody_has_opened(closed, words, status, small_script):
    """As under cron and some daemons: stdout or stderr is closed from the start. Nothing else changes."""
    command = f"exec {sys.executable} {small_script} {words} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=50)
    assert done.returncode == status and b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_without_docstrings(script):
    """python -OO drops them."""
    status, out, err = answer(["-OO", ROOT / f"{script}.py", "--help"])
    assert (status, err) == (0, b"") and b"--steps" in out


def test_nobody_reads_what_a_command_prints(tiny_data):
    """The same for the commands beside the scripts: `python -m common.data mvtec | head -1`."""
    for words in (["common.data", tiny_data], ["common.tables", "onenip"], ["docs.labs", "--help"], ["kernels.check"]):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", *map(str, words)]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=100)
        os.close(write)
        assert done.returncode in (0, 1) and b"Traceback" not in done.stderr, (words, done.stderr)


def test_ctrl_c_during_imports_is_one_line(small_script):
    process = subprocess.Popen([sys.executable, small_script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == b"importing\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"small.py: interrupted before the run began\n")
    assert time.monotonic() - began < 20


def test_ctrl_c_stays_ignored_where_the_shell_ignores_it(small_script):
    """`script & ` in a shell script: Ctrl-C is meant for others."""
    process = subprocess.Popen([sys.executable, small_script], stdout=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is PyTorch's on Linux")
@pytest.mark.parametrize("given, expected", [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_wait_briefly_unless_the_user_has_said_how(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGINT)
    try:
        options.before_torch(Args, PRESETS, "One line.")
        assert os.environ.get("GOMP_SPINCOUNT") == expected
    finally:
        signal.signal(signal.SIGINT, before)
        os.environ.pop("GOMP_SPINCOUNT", None)


# ------------------------------------------------------------------------------------- checkpoints


def checkpoint(path, method="method", **args):
    """A file that `load_checkpoint` takes, trained with these options."""
    torch.save({"method": method, "args": args, "model": {}, "finished": ["model"], "step": 4}, path)
    return path


def test_options_of_another_script_are_never_read(tmp_path):
    """Its values may be of another type, out of range, or blamed on options that the user has not typed."""
    path = checkpoint(tmp_path / "c.pt", "roads", width="3,4,6", data="nowhere")
    with pytest.raises(UsageError, match="c.pt: a checkpoint of roads.py, not of method.py"):
        parse("--eval", path)


def test_a_checkpoint_works_from_any_folder(tmp_path, monkeypatch):
    """Paths given to the training hold elsewhere; names of benchmarks stay names, and other words what they are."""
    (tmp_path / "there" / "photos" / "contrast").mkdir(parents=True)
    (tmp_path / "there" / "w.pth").write_text("")
    monkeypatch.chdir(tmp_path / "there")
    args = parse("--data", "photos+mvtec", "--weights", "w.pth")
    assert args.data == f"{tmp_path / 'there' / 'photos'}+mvtec" and args.weights == str(tmp_path / "there" / "w.pth")
    assert args.out == os.path.join("runs", "method-photos+mvtec")
    path = checkpoint(tmp_path / "c.pt", **dataclasses.asdict(args))
    monkeypatch.chdir(tmp_path)
    again = parse("--eval", path)
    assert (again.data, again.weights) == (args.data, args.weights)
    monkeypatch.chdir(tmp_path / "there" / "photos")
    args = parse("--classes", "contrast", "--corrupt", "contrast", "--out", "contrast")
    assert args.classes == args.corrupt == args.out == "contrast"


def test_a_file_that_a_checkpoint_was_trained_with_is_gone(tmp_path):
    """The message names checkpoint and file, not a mistake of the user's; --predict needs no data."""
    gone = str(tmp_path / "gone")
    path = checkpoint(tmp_path / "c.pt", data=gone)
    with pytest.raises(UsageError, match="c.pt was trained with --data .*gone, which is not there now; name it anew"):
        parse("--eval", path)
    assert parse("--eval", path, "--data", tmp_path).data == str(tmp_path)
    assert parse("--eval", path, "--predict", tmp_path).data == gone
    path = checkpoint(tmp_path / "c.pt", weights=gone)
    with pytest.raises(UsageError, match="--weights .*gone"):
        parse("--eval", path, "--predict", tmp_path)


def test_a_run_whose_data_have_moved_is_resumed(tmp_path):
    """What is gone must be named anew, and may then differ; what is still there may not."""
    (tmp_path / "args.json").write_text(json.dumps({"data": str(tmp_path / "gone"), "preset": "laptop", "width": 3}))
    with pytest.raises(UsageError, match="--data .*gone is not there now; name it anew"):
        parse("--resume", "--out", tmp_path)
    args = parse("--resume", "--out", tmp_path, "--data", tmp_path)
    assert (args.data, args.width) == (str(tmp_path), 3)
    with pytest.raises(UsageError, match="was started with --width 3"):
        parse("--resume", "--out", tmp_path, "--data", tmp_path, "--width", 4)


def test_the_default_folder_is_named_by_what_was_typed(tmp_path, monkeypatch):
    """By a link's own name, also where --resume looks for it."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert parse("--data", "link").out == options._default_out({"data": "link"}) == os.path.join("runs", "method-link")


@pytest.mark.parametrize("words", [("--corrupt", "contrast"), ("--shift", "all"), ("--save-maps",)])
def test_what_prediction_does_not_do_is_refused(words, tmp_path):
    with pytest.raises(UsageError, match=f"{words[0]} cannot be combined with --predict"):
        parse("--eval", checkpoint(tmp_path / "c.pt"), "--predict", tmp_path, *words)


def test_an_option_younger_than_its_run_is_off(tmp_path):
    """A checkpoint and an interrupted run of before an option existed have its default, not what the preset says now:
    they must give the numbers that they gave."""
    path = checkpoint(tmp_path / "c.pt", data="synth", preset="laptop")
    assert parse("--eval", path).width == Args().width != PRESETS["laptop"]["width"]
    assert parse("--eval", path, "--width", 5).width == 5
    (tmp_path / "args.json").write_text(json.dumps({"data": "synth", "preset": "laptop"}))
    assert parse("--resume", "--out", tmp_path).width == Args().width


def test_what_belongs_to_a_run_is_not_taken_from_a_checkpoint(tmp_path):
    path = checkpoint(tmp_path / "c.pt", threads="7", holdout=0.5, width=3)
    args = parse("--eval", path)
    assert (args.threads, args.holdout, args.width) == ("auto", 0.1, 3)
    assert runtime.parse is options.parse

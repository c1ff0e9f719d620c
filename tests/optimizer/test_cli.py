import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from optimizer.cli import _explain, _interrupted, main
from optimizer.errors import CannotRun, CommandError, Mistake, RecipeError
from passes.base import PassError
from runtime.errors import ArtifactError, SamplingError

COMMANDS = (
    "run",
    "plan",
    "sensitivity",
    "passes",
    "schema",
    "verify",
    "generate",
    "predict",
    "embed",
    "rerank",
    "bench",
    "clean",
    "init",
    "compare",
)


def modules_loaded_by(*commands: list[str]) -> set[str]:
    program = (
        "import sys, os, json\nfrom optimizer.cli import main\nout, sys.stdout = sys.stdout, open(os.devnull, 'w')\n"
        f"for args in {list(commands)!r}: main(args)\nprint(json.dumps(list(sys.modules)), file=out)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_help_loads_nothing_heavy() -> None:
    loaded = modules_loaded_by(["--help"])
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "pydantic", "yaml", "numpy", "rich", "onnx", "onnxruntime"}


def test_help_of_a_command_loads_nothing_heavy_but_what_typer_does() -> None:
    loaded = modules_loaded_by(*([command, "--help"] for command in COMMANDS))
    assert not loaded & {"torch", "transformers", "yaml", "numpy", "rich", "onnx", "onnxruntime"}


def test_passes_schema_and_mistakes_load_neither_torch_nor_its_friends(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("nam: x\n")
    loaded = modules_loaded_by(["passes"], ["schema"], [str(recipe)])
    assert "yaml" in loaded
    assert not loaded & {"torch", "transformers", "onnx", "onnxruntime", "datasets", "scipy"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert "..." not in out.partition("Commands:")[2]


def test_nothing_asked_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: optimize" in capsys.readouterr().out


def test_first_argument_that_is_no_command_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("nam: x\npasses: []\n")
    for args in ([str(recipe)], ["--json", str(recipe)], ["run", str(recipe), "--quiet"], ["plan", str(recipe)]):
        assert main(args) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines() == [
            f"{recipe}:1:1: missing key 'name', expected a name of letters, digits, '.', '_' and '-'",
            f"{recipe}:1:1: missing key 'model', expected a text",
            f"{recipe}:1:1: unknown key 'nam'; did you mean 'name'?",
            f"{recipe}:2:9: passes: got an empty list, expected a list of passes",
        ]


def test_wrong_setting_is_told_beside_the_mistakes_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nmodel: a/b\npasses: [quantize_rtn, export_onx]\n")
    assert main([str(recipe), "--set", "passes.0.group_size=33", "--set", "gate.alpha=2"]) == 2
    places = [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert places == ["--set gate.alpha=2", "--set passes.0.group_size=33", f"{recipe}:3:24"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["verifi"], "verifi: no such recipe or command; did you mean 'verify'?"),
        (["gone.yaml"], "gone.yaml: cannot be read, no such file or directory"),
        (["plan"], "Missing argument 'RECIPE'; see `optimize --help`"),
        (["x.yaml", "--colour"], "No such option: --colour; see `optimize --help`"),
        (["clean", "--older-than", "soon"], "Invalid value for '--older-than': "),
        (["init", "a/b", "--target", "abacus"], "--target: got 'abacus', expected cpu"),
        (["init", "nowhere"], "nowhere: no such folder, expected a folder or org/name@revision of the Hub"),
        (["generate", ".", "--prompt", "x", "--top-p", "2"], "top_p: got 2.0, expected a number above 0 and at most 1"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    assert capsys.readouterr().err.strip().startswith(message)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RecipeError([Mistake("r.yaml", 3, 4, "wrong")]), 2, "r.yaml:3:4: wrong"),
        (CommandError("--x: wrong"), 2, "--x: wrong"),
        (SamplingError("top_k: wrong"), 2, "top_k: wrong"),
        (CannotRun("no room"), 4, "no room"),
        (PassError("matched nothing"), 4, "matched nothing"),
        (ArtifactError("damaged"), 4, "damaged"),
        (MemoryError(), 4, "out of memory; close other programs or take a machine with more"),
        (OSError(errno.ENOSPC, "full", "/data"), 4, "/data: no space left; `optimize clean` frees some"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            4,
            "torch is not installed; run: pip install 'optimize-models[optimize]'",
        ),
    ],
)
def test_each_kind_of_error_is_one_line_with_its_exit_code(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _explain(error) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_bug_is_one_line_that_says_where_the_traceback_is(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("lost")
    except KeyError as error:
        assert _explain(error) == 70
    (line,) = capsys.readouterr().err.splitlines()
    traceback = Path(line.rpartition(" ")[2])
    assert line.startswith("a bug: KeyError: 'lost'; traceback in ")
    assert "test_cli.py" in traceback.read_text()
    traceback.unlink()


def test_interruption_is_130_and_one_line() -> None:
    program = (
        "import os, signal, sys, threading\nfrom optimizer.cli import main\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "sys.exit(main(['generate', '.', '--prompt', '-']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stderr is not None
        assert waiting.stderr.read() == "interrupted\n"
    assert waiting.returncode == 130


def test_clean_says_what_it_freed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", "--store", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: freed 0 B\n"


def test_verify_refuses_a_folder_without_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 4
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "is_kept"), [("batch", True), ("serve", False), ("bench", False), ("plan", True)])
def test_ctrl_c_says_whether_the_next_run_goes_on(command: str, is_kept: bool) -> None:
    assert ("the next run continues" in _interrupted([command])) == is_kept

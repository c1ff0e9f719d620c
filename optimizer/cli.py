"""The command line: `optimize RECIPE`, and the commands beside it. Thin; heavy imports wait until they are needed."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from typer.core import TyperGroup

from optimizer.errors import CommandError, ExitCode, OptimizeError
from optimizer.github import error_commands, is_github
from optimizer.serving_commands import Artifact, AsJson
from optimizer.serving_commands import app as serving_app
from passes._interrupts import interrupts_kept

_EXTRAS = {
    "cpu": {"onnxruntime"},
    "serve": {"fastapi", "starlette", "pydantic", "uvicorn", "httptools", "prometheus_client"},
    "optimize": {
        *("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "onnx", "onnx_ir", "onnxscript"),
        *("optimum", "datasets", "evaluate", "sklearn", "scipy"),
    },
}


class RecipeFirst(TyperGroup):
    """Takes a first argument that is no command as the recipe of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` before a recipe or its options."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RecipeFirst,
    help="Lower a Hugging Face model, pass by pass, to a small fast artifact, with a gate after every pass."
    "\n\n`optimize recipe.yaml` runs a recipe; `optimize run --help` lists its options.",
    subcommand_metavar="RECIPE | COMMAND [ARGS]...",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe: passes.0.group_size=32. Repeatable."),
]
StoreFolder = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Where passes keep their work; else OPTIMIZE_STORE.")
]
JUnitFile = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML, a case for each gate.")
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write the report in Markdown, whatever the verdict.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but mistakes.")]


@app.command()
def run(
    recipe: RecipePath,
    *,
    settings: Settings = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the artifact goes; artifacts/NAME if not given.")
    ] = None,
    store: StoreFolder = None,
    stop_after: Annotated[str | None, typer.Option(metavar="PASS", help="Run no further than this pass.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the artifact even when a gate did not pass.")] = False,
    junit: JUnitFile = None,
    report: ReportFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Run a recipe. The word `run` may be left out.

    Exit codes: 0 every gate passed, 1 a gate failed, 2 the recipe or the command line is wrong, 3 inconclusive,
    4 it could not be run, 70 a bug, 130 Ctrl-C.
    """
    import optimizer
    from optimizer.ci import Outputs

    if not recipe.exists() and recipe.suffix not in {".yaml", ".yml"}:
        raise CommandError(_no_such(str(recipe)))
    outputs = Outputs(junit, report)
    outputs.prepare()
    done = optimizer.run(
        recipe,
        settings or (),
        output=output,
        store=store,
        stop_after=stop_after,
        keep=keep,
        reporter=_style(quiet or json),
    )
    if json:
        typer.echo(done.to_json())
    return outputs.publish(done, sys.stderr if json else sys.stdout)


@app.command()
def compare(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="The artifact in use.", show_default=False)],
    candidate: Annotated[
        Path, typer.Argument(metavar="CANDIDATE", help="The artifact that may replace it.", show_default=False)
    ],
    *,
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with data, evaluate and gate; CANDIDATE's own recipe if not given."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change the policy: data.test.csv=test.csv. Repeatable."),
    ] = None,
    pinned: Annotated[
        Path | None, typer.Option(metavar="DIR", help="An artifact that CANDIDATE is judged against as well.")
    ] = None,
    on_inconclusive: Annotated[
        str | None, typer.Option(metavar="fail|pass", help="What an undecided gate counts as; else exit code 3.")
    ] = None,
    trust_evidence: Annotated[
        bool, typer.Option("--trust-evidence", help="Take answers from evidence/ where they are to the same items.")
    ] = False,
    store: StoreFolder = None,
    junit: JUnitFile = None,
    report: ReportFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Judge one artifact against another.

    Both answer the same items. Exit codes: 0 CANDIDATE is shown to be within every budget, 1 it is shown to be over
    one, 2 wrong input, 3 the items cannot tell, 4 it could not be done.
    """
    from optimizer.ci import Outputs
    from optimizer.compare import compare as compare_artifacts

    if on_inconclusive not in ("fail", "pass", None):
        raise CommandError(f"--on-inconclusive: got {on_inconclusive!r}, expected fail or pass")
    outputs = Outputs(junit, report, cast(Literal["fail", "pass"] | None, on_inconclusive))
    outputs.prepare()
    done = compare_artifacts(
        baseline,
        candidate,
        policy=policy,
        settings=settings or (),
        pinned=pinned,
        trust_evidence=trust_evidence,
        store=store,
        reporter=_style(quiet or json),
    )
    if json:
        typer.echo(done.to_json())
    return outputs.publish(done, sys.stderr if json else sys.stdout)


@app.command()
def plan(
    recipe: RecipePath,
    *,
    settings: Settings = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 where the plan has a warning.")] = False,
    store: StoreFolder = None,
    json: AsJson = False,
) -> int:
    """Say what a recipe would do, without doing it.

    Reads configuration, headers and texts, tries the architecture on a small twin and times a layer of each quantized
    form (seconds, once). Exit code 4 when a pass refuses the model.
    """
    from optimizer.recipe_reader import load

    checked = load(recipe, settings or ())

    from optimizer.pipeline import planned
    from optimizer.plan_report import plan_lines

    live: Literal["live", "quiet"] = "live" if sys.stderr.isatty() and not json else "quiet"
    made = planned(checked, store=store, reporter=live)
    typer.echo(made.to_json() if json else "\n".join(plan_lines(made)))
    if made.refused:
        return ExitCode.CANNOT_RUN
    return ExitCode.WRONG_INPUT if strict and made.warnings else ExitCode.PASS


@app.command()
def sensitivity(
    recipe: RecipePath,
    *,
    settings: Settings = None,
    step: Annotated[
        str | None, typer.Option("--pass", metavar="PASS", help="Another quantizing pass than the recipe's first.")
    ] = None,
    items: Annotated[
        int | None, typer.Option(min=2, help="Most texts to measure with; 32 of a decoder, 256 of others if not given.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a drawing (.svg) or the whole table (.md) besides.")
    ] = None,
    store: StoreFolder = None,
    json: AsJson = False,
) -> int:
    """Say which layers a quantizing pass hurts most.

    Changes one layer at a time and measures how far the model's answers move, on calibration texts if the recipe has
    any, else on those of its first evaluation that judge nothing; gates are not asked. Slow the first time: about half
    a scoring for every layer.
    """
    from optimizer.recipe_reader import load

    checked = load(recipe, settings or ())

    from optimizer.drawing import require_writable
    from optimizer.pipeline import damages
    from optimizer.sensitivity_report import lines, write

    if output is not None:
        require_writable("--output", output, (".svg", ".md"))
    live: Literal["live", "plain"] = "live" if sys.stderr.isatty() else "plain"
    found = damages(checked, pass_name=step, items=items, store=store, reporter="quiet" if json else live)
    if json:
        typer.echo(found.to_json())
    else:
        has_blocks = (sys.stdout.encoding or "").lower().startswith("utf")
        typer.echo("\n".join([*lines(found, has_blocks=has_blocks), f"{found.seconds:.1f} s"]))
    if output is not None:
        write(found, output)
        typer.echo(f"wrote {output}", err=json)
    return ExitCode.PASS


@app.command()
def passes(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print README's table.")] = False,
) -> int:
    """List the passes and their options."""
    from optimizer.catalogue import installed
    from optimizer.schema import pass_table, passes_text

    typer.echo((pass_table if markdown else passes_text)(installed()), nl=False)
    return ExitCode.PASS


@app.command()
def schema(
    run: Annotated[bool, typer.Option("--run", help="Of what `optimize RECIPE --json` prints instead.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Of what `optimize compare --json` prints instead.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Of what `optimize plan --json` prints instead.")] = False,
) -> int:
    """Print the JSON Schema of a recipe.

    Editors complete and check recipes with it: see the first line of each recipe.
    """
    from optimizer.generated import schema_text

    chosen = [name for name, is_chosen in (("run", run), ("compare", compare), ("plan", plan)) if is_chosen]
    if len(chosen) > 1:
        raise CommandError(f"{', '.join(f'--{name}' for name in chosen)}: got {len(chosen)}, expected one")
    typer.echo(schema_text(*chosen), nl=False)
    return ExitCode.PASS


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Folder, or org/name@revision of the Hub.", show_default=False)],
    target: Annotated[str, typer.Option(help="What the artifact will run on: cpu.")] = "cpu",
    data: Annotated[str, typer.Option(metavar="FILE", help="Held-out texts, JSON lines or CSV.")] = "",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The recipe; NAME.yaml if not given.")] = None,
) -> int:
    """Write a commented recipe for a model.

    Of the model, only config.json is read.
    """
    from optimizer.catalogue import installed
    from optimizer.draft import draft, read_config, write_new
    from optimizer.recipe import SERVED

    if target not in SERVED:
        raise CommandError(f"--target: got {target!r}, expected {' or '.join(SERVED)}")
    path = write_new(draft(model, read_config(model), installed(), device=target, data=data), output)
    typer.echo(f"wrote {path}; set its data and budgets, then run: optimize {path}")
    return ExitCode.PASS


@app.command()
def verify(
    folder: Artifact,
    digest: Annotated[str | None, typer.Option(metavar="HEX", help="The identity it must have.")] = None,
) -> int:
    """Check an artifact against its manifest.

    Every file is hashed; prints the artifact's identity.
    """
    from runtime.artifact import verify as verify_artifact

    manifest = verify_artifact(folder, digest)
    total = sum(entry.bytes for entry in manifest.files.values())
    typer.echo(f"{folder}: {manifest.kind}, {len(manifest.files)} files, {total / 1e6:.1f} MB, all as listed")
    typer.echo(f"digest {manifest.digest}")
    return ExitCode.PASS


app.add_typer(serving_app)


@app.command()
def clean(
    store: StoreFolder = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Only what was not used for so many days.")
    ] = None,
    keep_gb: Annotated[
        float | None, typer.Option(metavar="GB", min=0, help="Only the least recently used, until so much is left.")
    ] = None,
) -> int:
    """Remove what the passes keep for reuse.

    All of it unless told otherwise, but never what a run is using.
    """
    from optimizer.store import Store, default_root, format_bytes

    root = store or default_root()
    with Store(root) as opened:
        freed = opened.clean(
            older_than_days=older_than,
            keep_bytes=None if keep_gb is None else int(keep_gb * 1e9),
            everything=older_than is None and keep_gb is None,
        )
    typer.echo(f"{root}: freed {format_bytes(freed)}")
    return ExitCode.PASS


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; one line per mistake, a traceback for nobody but us."""
    args = sys.argv[1:] if args is None else args
    command = typer.main.get_command(app)
    try:
        with interrupts_kept():
            result = command.main(list(args) or ["--help"], prog_name="optimize", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return ExitCode.PASS
    except Exception as error:
        return _explain(error)
    if result == ExitCode.INTERRUPTED:  # typer makes an exit code of Ctrl-C
        return _tell(_interrupted(args), ExitCode.INTERRUPTED)
    return int(result or 0) if args else ExitCode.WRONG_INPUT


def _interrupted(args: Sequence[str]) -> str:
    """Say what Ctrl-C means: what serves an artifact, but for `batch`, keeps nothing for a next time."""
    serving = typer.main.get_command(serving_app)
    keeps_nothing = bool(args) and args[0] in serving.commands.keys() - {"batch"}  # type: ignore[attr-defined]
    return "interrupted" if keeps_nothing else "interrupted; the next run continues from here"


def _explain(error: Exception) -> int:
    """Print what went wrong and return the exit code that says so."""
    from passes.base import PassError
    from runtime.errors import DigestError, LoadError, PromptError, SamplingError, ServingError, SettingsError

    message, code = str(error), ExitCode.CANNOT_RUN
    if isinstance(error, OptimizeError):
        code = error.exit_code
    elif isinstance(error, DigestError | LoadError | PromptError | SamplingError | SettingsError):
        code = ExitCode.WRONG_INPUT
    elif hasattr(error, "format_message"):  # what typer raises for a wrong command line; its class is private
        message, code = f"{error.format_message().rstrip('.')}; see `optimize --help`", ExitCode.WRONG_INPUT
    elif isinstance(error, MemoryError):
        message = "out of memory; close other programs or take a machine with more"
    elif isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        message = f"{error.filename or 'disk'}: no space left; `optimize clean` frees some"
    elif isinstance(error, ModuleNotFoundError) and (extra := _extra_with(error.name)):
        message = f"{error.name} is not installed; run: pip install 'optimize-models[{extra}]'"
    elif not isinstance(error, PassError | ServingError):
        message = f"a bug: {type(error).__name__}: {error}; traceback in {_keep_traceback(error)}"
        code = ExitCode.BUG
    if is_github():
        for line in error_commands(message, error):
            typer.echo(line)
    return _tell(message, code)


def _extra_with(module: str | None) -> str | None:
    """Return the extra that installs a module."""
    return next((extra for extra, names in _EXTRAS.items() if module in names), None)


def _tell(message: str, code: ExitCode) -> int:
    typer.echo(message, err=True)
    return code


def _keep_traceback(error: Exception) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="optimize-bug-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name


def _style(is_quiet: bool) -> Literal["live", "plain", "quiet"]:
    """Return how a run shows what it does."""
    if is_quiet:
        return "quiet"
    return "live" if sys.stderr.isatty() else "plain"


def _no_such(name: str) -> str:
    from optimizer.reader import suggest

    commands = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    return f"{name}: no such recipe or command{suggest(name, commands)}"


if __name__ == "__main__":
    sys.exit(main())

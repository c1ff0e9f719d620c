import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from test_markdown import COMPARISON
from test_report import FASTER, PASSED, RUN, STEP, TIMING, Judged

from optimizer.cli import main
from optimizer.errors import ExitCode
from optimizer.generated import SCHEMAS, schema_text
from optimizer.record import Run, SizeVerdict, Step
from optimizer.schema import compare_schema, run_schema

ROOT = Path(__file__).parents[2]


def judged(*outcomes: str, size: SizeVerdict | None = None) -> Run:
    gates = tuple(Judged("perplexity", replace(PASSED, outcome=outcome)) for outcome in outcomes)
    return replace(RUN, steps=(replace(STEP, gates=gates),), size=size)


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ((), ExitCode.PASS),
        (("pass", "pass"), ExitCode.PASS),
        (("pass", "inconclusive"), ExitCode.INCONCLUSIVE),
        (("inconclusive", "fail"), ExitCode.FAIL),
    ],
)
def test_exit_code_is_that_of_the_worst_verdict(outcomes: tuple[str, ...], code: ExitCode) -> None:
    assert judged(*outcomes).exit_code == code


def test_size_over_its_budget_fails_the_run() -> None:
    assert judged("pass", size=SizeVerdict(41, 100, 0.4)).exit_code == ExitCode.FAIL
    assert judged("pass", size=SizeVerdict(40, 100, 0.4)).exit_code == ExitCode.PASS


@pytest.mark.parametrize(("outcome", "code"), [("fail", 1), ("inconclusive", 3), ("pass", 0)])
def test_speed_decides_with_the_others(outcome: str, code: int) -> None:
    run = replace(judged("pass"), speeds=(FASTER, replace(FASTER, outcome=outcome)), timing=TIMING)
    assert run.exit_code == code
    jsonschema.Draft7Validator(run_schema()).validate(json.loads(run.to_json()))


def test_only_the_last_model_decides() -> None:
    failed = replace(STEP, gates=(Judged("perplexity", replace(PASSED, outcome="fail")),))
    assert replace(RUN, steps=(failed, STEP)).exit_code == ExitCode.PASS


def test_document_of_every_kind_of_run_fits_the_schema() -> None:
    validator = jsonschema.Draft7Validator(run_schema())
    validator.check_schema(run_schema())
    nothing = Run("r", (Step("source", 1, {}),), None, None, None, "p", 0.1, earlier="artifacts/r")
    for run in (RUN, nothing, judged("fail", size=SizeVerdict(41, 100, 0.4))):
        validator.validate(json.loads(run.to_json()))


def test_number_that_is_not_finite_is_null() -> None:
    broken = replace(PASSED, candidate=math.nan, upper=math.inf)
    run = replace(RUN, steps=(replace(STEP, gates=(Judged("perplexity", broken),)),))
    verdict = json.loads(run.to_json())["steps"][0]["gates"][0]["verdict"]
    assert (verdict["candidate"], verdict["upper"]) == (None, None)
    jsonschema.Draft7Validator(run_schema()).validate(json.loads(run.to_json()))


@pytest.mark.parametrize("change", [{"colour": 1}, {"exit_code": 5}, {"steps": None}, {"format": 2}])
def test_schema_refuses_what_is_no_run(change: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(run_schema()).validate(json.loads(RUN.to_json()) | change)


def test_schema_tells_what_the_fields_mean() -> None:
    step = run_schema()["properties"]["steps"]["items"]
    assert step["properties"]["pass_s"]["description"].startswith("seconds the pass took")
    assert step["properties"]["gates"]["items"]["properties"]["verdict"]["properties"]["limit"]["description"]


@pytest.mark.parametrize("of", SCHEMAS)
def test_published_schema_is_current_and_printed(of: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (ROOT / SCHEMAS[of][0]).read_text(encoding="utf-8") == schema_text(of), "run: make fix"
    assert main(["schema", *([] if of == "recipe" else [f"--{of}"])]) == 0
    assert capsys.readouterr().out == schema_text(of)


def test_two_schemas_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--run", "--compare"]) == 2
    assert capsys.readouterr().err == "--run, --compare: got 2, expected one\n"


def test_document_of_every_kind_of_comparison_fits_the_schema() -> None:
    validator = jsonschema.Draft7Validator(compare_schema())
    validator.check_schema(compare_schema())
    broken = replace(COMPARISON.against[0].gates[0].verdict, upper=math.inf, outcome="fail")
    failed = replace(COMPARISON.against[0], gates=(Judged("p", broken),), size=None)
    for compared in (COMPARISON, replace(COMPARISON, against=(failed, failed), notes=())):
        document = json.loads(compared.to_json())
        validator.validate(document)
        assert document["exit_code"] == compared.exit_code
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(json.loads(COMPARISON.to_json()) | {"colour": 1})

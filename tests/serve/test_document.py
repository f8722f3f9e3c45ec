"""The OpenAPI document, tried by schemathesis: no 5xx, and answers as it declares them."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
          negative_data_rejection]  # fmt: skip


STREAMING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
SIZES = ("n", "max_tokens", "max_completion_tokens", "max_output_tokens")
SEVERAL = hypothesis.settings(max_examples=10, deadline=None, database=None,
                              suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip


@pytest.fixture(scope="module")
def api(site):
    schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
    return schema.exclude(path="/api/runs/{name}/stream")  # has no end


@pytest.mark.parametrize(
    ("mode", "is_streamed"),
    [(GenerationMode.POSITIVE, False), (GenerationMode.POSITIVE, True), (GenerationMode.NEGATIVE, False)],
)
def test_answers_are_as_declared(api, mode, is_streamed):
    tried = 0
    for found in api.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue
        if is_streamed and not operation.path.startswith(STREAMING):
            continue

        @SEVERAL
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def call(case):
            for name in SIZES:  # to be quick
                if isinstance(case.body, dict) and isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 4)
            if is_streamed and isinstance(case.body, dict):
                case.body["stream"] = True
            case.call_and_validate(checks=CHECKS, timeout=30)

        call()
        tried += 1
    assert tried >= (3 if is_streamed else 6)


def test_it_names_the_model_and_every_error(http):
    document = http.get("/openapi.json").json()
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["tiny"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            assert {"200", "400", "401", "404", "429", "503"} <= set(operation["responses"]), path

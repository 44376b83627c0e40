"""Answers that gateways publish, byte for byte, as callers of this package get them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import ROOT
from wsproxy import (
    AgentBusy,
    AgentGone,
    AgentOffline,
    CallCancelled,
    CallDuplicate,
    CallTimeout,
    InvalidRequest,
    Progress,
    ToolError,
)
from wsproxy._calls import answer_of, progress_of, read_object

VECTORS = ROOT / "spec/agents"
FAILURES = json.loads((VECTORS / "failures.json").read_text())["failures"]
MESSAGES = json.loads((VECTORS / "agent_messages.json").read_text())["cases"]
ERRORS: dict[str, type[Exception]] = {
    "timeout": CallTimeout,
    "agent_offline": AgentOffline,
    "agent_gone": AgentGone,
    "cancelled": CallCancelled,
    "busy": AgentBusy,
    "duplicate": CallDuplicate,
    "conflict": InvalidRequest,
    "bad_request": InvalidRequest,
}


def named(cases: list[Any], name: str) -> list[Any]:
    return [pytest.param(each, id=f"{each[name]} {number}") for number, each in enumerate(cases)]


@pytest.mark.parametrize("case", named(FAILURES, "code"))
def test_each_failure_is_an_error_of_its_own(case: Any) -> None:
    message, problem = read_object(case["published_to_reply_to"])
    with pytest.raises(ERRORS[case["code"]]) as raised:
        answer_of(message, problem, "q-1")
    assert str(raised.value).endswith(case["message"])
    assert getattr(raised.value, "request_id", "q-1") == "q-1"


@pytest.mark.parametrize("case", named([each for each in MESSAGES if each["kind"] == "response"], "name"))
def test_each_response_is_a_result_or_the_tools_error(case: Any) -> None:
    message, problem = read_object(case["published_to_reply_to"])
    assert (message["requestId"], message["userId"]) == ("q-1", "u1")
    if case["success"]:
        assert answer_of(message, problem, "q-1") == json.loads(case["result"] or "null")
    else:
        with pytest.raises(ToolError) as raised:
            answer_of(message, problem, "q-1")
        assert str(raised.value) == json.loads(case["error"])


@pytest.mark.parametrize("case", named([each for each in MESSAGES if each["kind"] == "progress"], "name"))
def test_progress_is_the_same_over_redis_and_http(case: Any) -> None:
    over_redis, over_http = (
        progress_of(read_object(case[each])[0]) for each in ("published_to_reply_to", "event_data")
    )
    assert isinstance(over_redis, Progress)
    assert over_redis == over_http
    assert over_redis.progress == json.loads(case["message"])["progress"]

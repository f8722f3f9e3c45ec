"""Where no MODEL is named, the models that come with miaobi answer: which, what is said, and what is not guessed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.serve.conftest import write_classifier, write_model

from miaobi import released
from miaobi.corpus.template import SEP_TEMPLATE
from miaobi.errors import UserError
from miaobi.serve import server
from miaobi.serve.config import Serve
from miaobi.serve.served import served_name

HERE = Path(released.__file__).parents[2] / "models"
"""The weights of this checkout, where it has them."""
ASKED = {
    "sample": ("miaobi-base", ["sample", "--start=皇马", "--num_samples=1", "--max_new_tokens=3", "--seed=1"]),
    "chat": ("miaobi-chat", ["chat", "--max_new_tokens=3", "--seed=1"]),
    "classify predict": ("miaobi-sentiment", ["classify", "predict", "--input=皇马赢得比赛"]),
}
"""Verb -> what answers, and a command without MODEL."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an installed package that came with a small family."""
    place = tmp_path_factory.mktemp("site-packages") / "miaobi"
    write_model(place / "models" / "base", SEP_TEMPLATE)
    write_model(place / "models" / "chat", SEP_TEMPLATE)
    write_classifier(place / "models" / "sentiment")
    return place


@pytest.fixture
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """miaobi looks there."""
    monkeypatch.setattr(released, "__file__", str(package / "released.py"))
    return package / "models"


@pytest.fixture
def stripped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """miaobi looks where no models are, as in a checkout before a release."""
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.setattr(released, "__file__", str(tmp_path / "src" / "miaobi" / "released.py"))
    return tmp_path / "models"


@pytest.fixture
def ask(miaobi: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`miaobi`, with one line on standard input."""

    def command(*args: object):
        import io

        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode())))
        return miaobi(*args, "--device=cpu")

    return command


@pytest.mark.parametrize("verb", ASKED)
def test_without_a_model_the_one_that_came_answers_and_says_so_in_a_line(verb: str, ask: Callable, installed: Path):
    name, command = ASKED[verb]
    answer = ask(*command, "--json")
    assert answer.code == 0, answer.err
    (said,) = [line for line in answer.err.splitlines() if "no MODEL named" in line]
    place = installed / {"miaobi-base": "base", "miaobi-chat": "chat", "miaobi-sentiment": "sentiment"}[name]
    assert name in said
    assert str(place / "README.md") in said
    json.loads(answer.out)
    named = ask(*command[: len(verb.split())], place, *command[len(verb.split()) :], "--json")
    assert "no MODEL named" not in named.err
    without_speed = [re.sub(r'"tokens_per_second": [\d.]+', "", out) for out in (answer.out, named.out)]
    assert without_speed[0] == without_speed[1], "the same model, named or not"


@pytest.mark.parametrize("verb", ASKED)
@pytest.mark.parametrize("naming", [["nothing_here"], ["--out_dir=nothing_here"], ["--model=nothing_here"]])
def test_a_model_that_is_named_and_missing_is_an_error(verb: str, naming: list, ask: Callable, installed: Path):
    if naming == ["--out_dir=nothing_here"] and verb == "classify predict":
        naming = ["--model=nothing_here"]
    command = ASKED[verb][1]
    answer = ask(*command[: len(verb.split())], *naming, *command[len(verb.split()) :])
    assert answer.code == 2
    assert "no model at nothing_here" in answer.err
    assert "no MODEL named" not in answer.err


@pytest.mark.parametrize("verb", ["sample", "chat", "serve", "classify predict"])
def test_an_empty_name_is_a_variable_that_is_not_set(verb: str, ask: Callable, installed: Path):
    answer = ask(*verb.split(), "")
    assert answer.code == 2
    assert "is empty (a variable that is not set?)" in answer.err


@pytest.mark.parametrize("verb", ["sample", "chat", "serve"])
@pytest.mark.parametrize("checkpoint", ["last", "step-20"])
def test_a_checkpoint_is_of_a_run_that_must_be_named(verb: str, checkpoint: str, ask: Callable, installed: Path):
    answer = ask(verb, f"--checkpoint={checkpoint}")
    assert answer.code == 2
    assert f"--checkpoint={checkpoint} is of a run: name that as well" in answer.err


@pytest.mark.parametrize("command", [*(command for _, command in ASKED.values()), ["serve", "--port=0"]])
def test_a_copy_without_weights_says_what_to_do(command: list, ask: Callable, stripped: Path):
    answer = ask(*command)
    assert answer.code == 2
    assert "this copy of miaobi came without miaobi-" in answer.err
    assert "Name a run or model directory" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("text", ["早餐不错", "皇马", "not/a/model", "一" * 60])
def test_one_word_for_predict_is_a_model_and_the_error_says_how_a_text_is_given(text: str, ask: Callable, installed):
    answer = ask("classify", "predict", text)
    assert answer.code == 2
    assert "--input=TEXT" in answer.err
    assert "no MODEL named" not in answer.err


def test_predict_without_anything_reads_standard_input(ask: Callable, installed: Path):
    answer = ask("classify", "predict", "--json")
    assert answer.code == 0, answer.err
    assert [row["text"] for row in json.loads(answer.out)["predictions"]] == ["你好"]


def test_a_server_of_nothing_named_serves_the_family_by_one_name(installed: Path, package: Path):
    cfg = server.with_models(Serve())
    assert (cfg.model, cfg.chat_model) == (str(installed / "base"), str(installed / "chat"))
    assert cfg.classifier == str(installed / "sentiment")
    assert served_name(cfg.model) == "miaobi"
    assert served_name(str(package)) == "miaobi"


@pytest.mark.parametrize("named", ["model", "chat_model", "classifier", "runs"])
def test_a_server_of_something_named_serves_that_alone(named: str, stripped: Path):
    cfg = Serve(**{named: "mine"})
    assert server.with_models(cfg) is cfg


def test_other_directories_keep_their_names(installed: Path, tmp_path: Path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    assert served_name(str(tmp_path / "models" / "base")) == "base"


def test_what_ships_is_found_in_a_checkout_and_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models" / "chat").mkdir(parents=True)
    monkeypatch.setattr(released, "__file__", str(tmp_path / "src" / "miaobi" / "released.py"))
    assert released.shipped("models", "chat") == tmp_path / "models" / "chat"
    (tmp_path / "src" / "miaobi" / "models" / "chat").mkdir(parents=True)
    assert released.shipped("models", "chat") == tmp_path / "src" / "miaobi" / "models" / "chat"


def test_half_a_family_is_named_by_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_model(tmp_path / "miaobi" / "models" / "base")
    monkeypatch.setattr(released, "__file__", str(tmp_path / "miaobi" / "released.py"))
    with pytest.raises(UserError, match="came without miaobi-chat"):
        released.released("base", "chat")


@pytest.mark.skipif(not (HERE / "chat" / "config.json").is_file(), reason="this checkout has no released weights")
class TestTheWeightsOfThisCheckout:
    """What a fresh clone answers with."""

    def test_they_are_small_and_each_has_a_card_with_sources_limits_and_copies(self):
        files = [file for name in released.NAMES for file in (HERE / name).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= 20_000_000
        for name in released.NAMES:
            card = (HERE / name / "README.md").read_text(encoding="utf-8")
            for title in ("Sources and licences", "Limits", "Not for"):
                assert f" · {title}\n" in card, name
            assert ("Verbatim overlap" in card) == (name != "sentiment")
            assert "CC BY-SA 4.0" in card

    def test_they_write_talk_and_judge(self, ask: Callable):
        (text,) = json.loads(ask(*ASKED["sample"][1], "--json").out)["samples"]
        assert text["text"].startswith("皇马")
        assert text["tokens"] == 3 or text["finish_reason"] == "stop"
        question, reply = json.loads(ask("chat", "--json", "--seed=1").out)["messages"]
        assert question["content"] == "你好"
        assert reply["content"].strip()
        found = ask("classify", "predict", "--input=多人在车祸中死亡，警方正在调查。", "--json")
        (judged,) = json.loads(found.out)["predictions"]
        assert judged["probabilities"].keys() == {"正面", "中性", "负面"}
        assert sum(judged["probabilities"].values()) == pytest.approx(1, abs=1e-3)

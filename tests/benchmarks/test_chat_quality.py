"""Chats judged and improved: talks of five turns, and the preference for a model's own good replies."""

import json
from pathlib import Path

import pytest
import torch
from models.steps import preference

from benchmarks import chat_quality
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.generate.chat import Chat
from miaobi.generate.config import ChatConfig
from miaobi.generate.engine import Completion, LanguageModel, load
from miaobi.model.checkpoint import load_model

WORDS = ["你好", "今天去哪", "吃了吗", "下雨了", "我不知道", "再见", "明天见", "好的", "谢谢", "没关系"]


@pytest.fixture(scope="module")
def talk_data(tmp_path_factory) -> Path:
    """Prepared chit-chat: dialogues of three to six utterances."""
    place = tmp_path_factory.mktemp("talks")
    said = ["\n".join(f"{WORDS[(i + j) % 10]}{(i * 7 + j) % 60}" for j in range(3 + i % 4)) for i in range(160)]
    (place / "talks.txt").write_text("\n\n".join(said) + "\n", encoding="utf-8")
    prepare(
        [str(place / "talks.txt")], PrepareConfig(out=place / "data", format="dialogue", val_fraction=0.4, workers=1)
    )
    return place / "data"


@pytest.fixture(scope="module")
def run(talk_data, tmp_path_factory) -> Path:
    """A chit-chat model that often does not stop."""
    from miaobi.settings import load_config
    from miaobi.train.loop import train

    settings = {
        "data": talk_data, "out_dir": tmp_path_factory.mktemp("run") / "run", "n_layer": 1, "n_head": 2, "n_embd": 32,
        "block_size": 96, "batch_size": 8, "max_iters": 50, "eval_interval": 50, "eval_iters": 1, "sample_tokens": 0,
        "device": "cpu", "dtype": "float32", "compile": False,
    }  # fmt: skip
    train(*load_config(None, [(key, str(value)) for key, value in settings.items()]))
    return settings["out_dir"]


def reply(text: str, stopped: bool = True) -> Completion:
    return Completion(text, 1, "stop" if stopped else "length")


def test_a_users_side_is_every_second_utterance_of_dialogues_one_after_another():
    said = [["一", "甲", "二", "乙", "三"], ["四", "丙", "五", "丁"], [f"{i}" for i in range(12)]]
    assert chat_quality.user_sides(said, 2) == [["一", "二", "三", "四", "五"], ["0", "2", "4", "6", "8"]]
    with pytest.raises(UserError, match="enough for 2 talks of 5 turns, not 3"):
        chat_quality.user_sides(said, 3)


def test_a_talk_is_good_where_its_replies_are_also_together():
    words = [reply(text) for text in ("你好呀", "在家看书", "下雨了不想出门", "好的", "明天见")]
    assert chat_quality.is_good_talk(words)
    assert not chat_quality.is_good_talk([*words[:4], reply("明天见", stopped=False)])
    assert not chat_quality.is_good_talk([reply("我不知道"), reply("我不知道呀"), reply("这个我不知道"), *words[:2]])
    figures = chat_quality.judged([*words[:3], reply("好", stopped=False)], [words, [*words[:4], reply("不停", False)]])
    assert (figures["good"], figures["good_talks"], figures["good_replies_of_talks"]) == (0.75, 0.5, 0.9)


def test_talks_at_once_are_those_of_a_chat(run, talk_data):
    data = PreparedData.open(talk_data)
    lm, said = load(str(run), "cpu", "float32"), chat_quality.utterances(data, data.val)
    texts = (talk_data.parent / "talks.txt").read_text(encoding="utf-8")
    assert all("\n".join(turns) in texts for turns in said)
    cfg = ChatConfig(temperature=0, top_p=1.0, repetition_penalty=1.1, max_new_tokens=16, seed=3)
    sides = chat_quality.user_sides(said, 6)
    for side, answers in zip(sides, chat_quality.converse(lm, sides, cfg), strict=True):
        chat = Chat(lm, cfg)
        assert [answer.text for answer in answers] == ["".join(chat.reply(message)) for message in side]


def test_likelihoods_are_sums_of_the_models_own(run):
    model, tokenizer = load_model(run)
    rows = [
        (tokenizer.encode("你好"), tokenizer.encode("再见呀")),
        (tokenizer.encode("今天去哪里") * 3, tokenizer.encode("好")),
    ]
    lm = LanguageModel(model, tokenizer)
    for (prompt, answer), found in zip(rows, preference.log_likelihoods(model, rows), strict=True):
        log_p = lm.logits(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        one_by_one = sum(log_p[len(prompt) - 1 + i, id_].item() for i, id_ in enumerate(answer))
        assert found.item() == pytest.approx(one_by_one, abs=1e-3)


def test_preference_makes_good_replies_likelier_and_says_what_it_gained(run, talk_data, tmp_path, monkeypatch):
    monkeypatch.setattr(preference, "SAMPLING", preference.SAMPLING[:2])
    args = preference.Args(str(run), talk_data, tmp_path / "out", talks=12, draws=3, batch_size=4, max_new_tokens=12,
                           epochs=2, learning_rate=1e-3, openings=12, measured_talks=4)  # fmt: skip
    result = preference.main(args)
    figures = result["figures"]
    assert result["pairs"] >= 5
    assert figures["after"]["good"] > figures["before"]["good"]
    written = json.loads((args.out / "generation_config.json").read_text(encoding="utf-8"))
    assert {name: written[name] for name in preference.NAMES} == result["sampling"]
    assert json.loads((args.out / preference.RESULT).read_text(encoding="utf-8")) == result
    columns, rows = preference.table(figures)
    assert {len(row) for row in rows} == {len(columns)}
    assert load(str(args.out), "cpu").tokenizer.config["chat_template"]
    again = preference.main(preference.Args(**vars(args) | {"out": tmp_path / "again"}))
    assert again == result, "the seed decides"


def test_a_model_without_bad_replies_is_left_alone(run, talk_data, tmp_path):
    args = preference.Args(str(run), talk_data, tmp_path / "out", talks=2, draws=1, openings=2, measured_talks=1)
    with pytest.raises(UserError, match="too few to learn from"):
        preference.main(args)
    assert not args.out.exists()

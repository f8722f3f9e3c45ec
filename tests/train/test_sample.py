"""The sample that a run prints at each evaluation: where it starts, and that a dialogue's is a reply."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dialogue import GREETING, first_message
from miaobi.corpus.examples import TrainingTemplate
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.template import CHATML_TEMPLATE, SEP_TEMPLATE
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.generate.chat import preview

SYSTEM_ADDED = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n你是妙笔<|im_end|>\n{% endif %}" + CHATML_TEMPLATE
)
PLAIN_WORDS = (
    "{% for m in messages %}{{ ('问：' if m['role'] == 'user' else '答：') + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}答：{% endif %}"
)
UPPER = (
    "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)


def said(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Messages of two speakers in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize("template", [SEP_TEMPLATE, CHATML_TEMPLATE, SYSTEM_ADDED, PLAIN_WORDS, UPPER])
@pytest.mark.parametrize("message", ["你好", "1加2是几", "<sep>是什么？<|im_end|>", "user", "😀"])
def test_the_first_message_is_found_in_what_a_template_wrote(template: str, message: str):
    tokenizer = Tokenizer.train_char(dict.fromkeys("你好是什么？答问：妙笔几加\n user", 1))
    tokenizer.config["chat_template"] = template
    for messages in (said(message), said(message, "好的", "再见"), said(message, message, message)):
        ids = TrainingTemplate.of(tokenizer).render(messages).ids
        assert first_message(tokenizer, ids) == (message.upper() if template is UPPER else message)


def test_what_the_system_or_the_assistant_says_before_is_passed_over():
    tokenizer = Tokenizer.train_char(dict.fromkeys("你好是谁妙笔", 1))
    tokenizer.config["chat_template"] = CHATML_TEMPLATE
    template = TrainingTemplate.of(tokenizer)
    system = {"role": "system", "content": "你是妙笔"}
    assert first_message(tokenizer, template.render([system, *said("谁是你", "妙笔")]).ids) == "谁是你"
    assert first_message(tokenizer, template.render(said("妙笔", "谁是你", first="assistant")).ids) == "谁是你"
    assert first_message(tokenizer, template.render([system]).ids) == GREETING, "nobody asks anything"


@pytest.mark.parametrize(("known", "message"), [("你好皇马", "皇马"), ("ab皇马", "马皇"), ("皇马", GREETING)])
def test_a_vocabulary_that_knows_few_characters_is_no_reason_to_end_a_run(known: str, message: str):
    """Of BERT's kind, whose others are all [UNK]: a digit stands for no other then."""
    names = ["[PAD]", "[UNK]", "user", "assistant", *known]
    backend = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("user|assistant|."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(backend, {"chat_template": CHATML_TEMPLATE})
    ids = TrainingTemplate.of(tokenizer).encode(said("皇马" if message == GREETING else message, "好"))
    assert first_message(tokenizer, ids) == message


def prepared_dialogues(place: Path, form: str) -> Path:
    """Dialogues as text or as messages, prepared."""
    asked = [f"{name}是谁{end}" for name in "甲乙丙丁戊己庚辛壬癸" for end in ("？", "呢", "呀")]
    if form == "sep":
        file = place / "chat.txt"
        file.write_text("\n\n".join(f"{text}\n不知道{text[0]}\n哦" for text in asked), encoding="utf-8")
    else:
        file = place / "chat.jsonl"
        lines = [json.dumps({"messages": said(text, f"不知道{text[0]}")}, ensure_ascii=False) for text in asked]
        file.write_text("\n".join(lines), encoding="utf-8")
    prepare([str(file)], PrepareConfig(out=place / "data", format="dialogue", val_fraction=0.2))
    return place / "data"


@pytest.mark.parametrize(("form", "packing"), [("sep", "auto"), ("sep", "stream"), ("chatml", "auto")])
def test_a_run_on_dialogues_prints_a_reply_to_the_first_message_of_validation(train, tmp_path, capsys, form, packing):
    data = prepared_dialogues(tmp_path, form)
    seen = []

    def spy(*given):
        seen.append(given)
        return preview(*given)

    train(data=data, out_dir=tmp_path / "run", packing=packing, sample_tokens=5, preview=spy)
    opened = PreparedData.open(data)
    ids = np.fromfile(data / "val.bin", "<u2")[: int(opened.val.starts[1])]
    text = Tokenizer.load(data).decode(ids.tolist())
    expected = next(text[i : i + 4] for i in range(len(text)) if text[i + 1 : i + 3] == "是谁")
    assert [given[2:] for given in seen] == [(expected, 5, opened.end_ids, True)] * 2
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert shown[0] == f"  >>>{expected}"
    assert shown[1].strip()
    assert "<" not in "".join(shown), "no control token is read or written as text"


def test_sample_start_is_the_message_and_plain_text_goes_on_as_text(train, prepared, tmp_path, capsys):
    data = prepared_dialogues(tmp_path, "sep")
    train(data=data, out_dir=tmp_path / "talk", sample_tokens=5, sample_start="壬在吗", max_iters=10, preview=preview)
    assert "  >>>壬在吗\n" in capsys.readouterr().err
    train(data=prepared(), out_dir=tmp_path / "text", sample_tokens=5, max_iters=10, preview=preview)
    start = Tokenizer.load(prepared()).decode(np.fromfile(prepared() / "val.bin", "<u2")[:8].tolist())
    shown = capsys.readouterr().err
    assert f"\n  {start}" in shown
    assert ">>>" not in shown


def test_a_template_that_fills_the_block_does_not_end_a_run(train, tmp_path):
    data = prepared_dialogues(tmp_path, "chatml")
    result = train(data=data, out_dir=tmp_path / "run", block_size=16, sample_tokens=20, max_iters=10, preview=preview)
    assert result["step"] == 10

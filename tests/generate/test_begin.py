"""What a foreign tokenizer puts before every text: sampled, evaluated and tuned with it, as transformers does."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.template import ChatTemplate
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.generate.config import SampleConfig
from miaobi.generate.engine import load
from miaobi.train.config import EvalConfig
from miaobi.train.score import score

TEXT = "皇马赢得比赛。hello world，球迷期待冠军！"
FRAMES = {"<s> $A": ["<s>"], "$A": [], "$A </s>": [], "<s> $A </s>": ["<s>"], "<g> <s> $A": ["<g>", "<s>"],
          "</s> $A": ["</s>"]}  # fmt: skip


def written(path: Path, frame: str, family: str = "llama", **config: object) -> transformers.PreTrainedModel:
    """A random model whose tokenizer.json frames texts like that, as transformers writes it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<g>"]
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=specials))  # fmt: skip
    ids = [(name, backend.token_to_id(name)) for name in specials]
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=frame, special_tokens=ids)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", split_special_tokens=True, **config
    )
    fast.save_pretrained(path)
    kind = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)}[family]  # fmt: skip
    cfg = kind[0](
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=ids[0][1], eos_token_id=ids[1][1],
    )  # fmt: skip
    torch.manual_seed(1)
    model = kind[1](cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.3)
    model.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("frame", FRAMES)
def test_greedy_text_is_that_of_transformers(tmp_path, frame, family):
    theirs, hub = written(tmp_path, frame, family), transformers.AutoTokenizer.from_pretrained(tmp_path)
    lm = load(tmp_path, "cpu", "float32")
    names = [lm.tokenizer.token_to_id(name) for name in FRAMES[frame]]
    assert lm.tokenizer.begin_ids == names
    cfg = SampleConfig(num_samples=1, max_new_tokens=24, temperature=0)
    for prompt in ("皇马赢得", "hello <s>world", " 球迷"):
        ids = hub(prompt, split_special_tokens=True).input_ids
        if frame.endswith("</s>"):
            ids = ids[:-1]  # nobody goes on behind the end
        assert lm.tokenizer.encode_prompt(prompt) == ids
        assert ids.count(names[-1] if names else -1) == bool(names), "a <s> in the text stays text"
        out = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
                              max_new_tokens=24, eos_token_id=None, pad_token_id=0)[0, len(ids) :].tolist()  # fmt: skip
        assert list(lm.tokens(prompt, cfg)) == out
        text = lm.generate(prompt, cfg)[0].text
        assert text.startswith(prompt), "and is not shown"
        assert text == prompt + "".join(lm.stream(prompt, cfg))


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_a_text_of_berts_kind_begins_with_its_cls(tmp_path, form):
    """As UER's Chinese GPT-2s were trained. transformers writes a [SEP] behind the prompt too, where a text ends."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", *dict.fromkeys("皇马赢得比赛球迷期待")]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    hub = transformers.BertTokenizer.from_pretrained(tmp_path)
    if form == "tokenizer.json":
        hub.save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").unlink(missing_ok=True)
    torch.manual_seed(1)
    size = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": len(words)}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, eos_token_id=3)).eval()
    theirs.save_pretrained(tmp_path)
    lm = load(tmp_path, "cpu", "float32")
    for prompt in ("皇马赢得", "hello", ""):
        ids = hub(prompt).input_ids[:-1]
        assert lm.tokenizer.encode_prompt(prompt) == ids
        out = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
                              max_new_tokens=12, pad_token_id=0)[0, len(ids) :].tolist()  # fmt: skip
        drawn = list(lm.tokens(prompt, SampleConfig(num_samples=1, max_new_tokens=12, temperature=0)))
        assert drawn == out[: len(drawn)]
        assert out[len(drawn) :] in ([], [3])


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""], ids=["written", "left out"])
@pytest.mark.parametrize("frame", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_a_chat_begins_as_its_template_says_and_not_twice(tmp_path, frame, bos):
    """Also where the tokenizer frames texts by itself: transformers renders a template without that frame."""
    written(tmp_path, frame)
    file = tmp_path / "tokenizer_config.json"
    template = bos + "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    settings = json.loads(file.read_text()) | {"split_special_tokens": False, "chat_template": template}
    file.write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    hub, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    messages = [{"role": "user", "content": "皇马赢得"}, {"role": "assistant", "content": "hello"}]
    for said, prompt in ((messages, False), (messages[:1], True)):
        ids = list(hub.apply_chat_template(said, add_generation_prompt=prompt, return_dict=False))
        assert ChatTemplate.of(ours).encode(said, add_generation_prompt=prompt) == ids
        assert ids.count(hub.bos_token_id) == bool(bos)
    lines = [json.dumps({"messages": [{**messages[0], "content": f"皇马{n}"}, messages[1]]}) for n in range(30)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare([str(tmp_path / "chat.jsonl")], PrepareConfig(out=tmp_path / "data", format="dialogue", workers=1,
                                                          tokenizer=str(tmp_path)))  # fmt: skip
    learned = np.fromfile(tmp_path / "data" / "train.bin", np.uint16).tolist()
    dialogues = np.fromfile(tmp_path / "data" / "train.idx", np.uint64)
    assert learned.count(hub.bos_token_id) == len(dialogues) * bool(bos)


def test_a_tokenizer_that_is_told_not_to_begin_does_not(tmp_path):
    written(tmp_path, "<s> $A", add_bos_token=False)
    assert Tokenizer.load(tmp_path).begin_ids == []


@pytest.mark.parametrize("texts", [["皇马赢得比赛。"], ["皇马赢得比赛。", "球迷期待冠军！hello", "world"]])
def test_evaluated_as_transformers_scores_the_framed_documents(tmp_path, texts):
    """Every document behind its <s>, which costs nothing, and its </s>, which does."""
    theirs = written(tmp_path / "model", "<s> $A")
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    stream = [i for one in texts for i in [*hub(one).input_ids, hub.eos_token_id]]
    result = score(EvalConfig(model=str(tmp_path / "model"), data=(str(text),), split="val", device="cpu",
                              dtype="float32"))  # fmt: skip
    ids = torch.tensor([stream])
    labels = ids.masked_fill(ids == hub.bos_token_id, -100)
    with torch.no_grad():
        nats = theirs(ids, labels=labels).loss.item() * (labels[:, 1:] != -100).sum().item()
    assert result["bits_per_char"] == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-4)


def test_prepared_documents_begin_with_it(tmp_path):
    written(tmp_path / "model", "<s> $A")
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [f"皇马赢得比赛{n}。" for n in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    data = tmp_path / "data"
    prepare([str(tmp_path / "text.txt")], PrepareConfig(out=data, tokenizer=str(tmp_path / "model"), workers=1))
    ids = np.concatenate([np.fromfile(data / name, np.uint16) for name in ("train.bin", "val.bin")]).tolist()
    documents = {(*hub(text).input_ids, hub.eos_token_id) for text in texts}
    ends = [i + 1 for i, id_ in enumerate(ids) if id_ == hub.eos_token_id]
    assert {tuple(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)} == documents
    result = score(EvalConfig(model=str(tmp_path / "model"), data=(str(data),), split="train", device="cpu",
                              dtype="float32"))  # fmt: skip
    train = np.fromfile(data / "train.bin", np.uint16)
    assert result["tokens"] == (train != hub.bos_token_id).sum()

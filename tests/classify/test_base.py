"""How texts are laid out for a base model: in the frame that its own tokenizer puts around them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from review_tables import reviews, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from miaobi.classify import head

TEXTS = ["房间很好，服务差。", "nice hotel</s>[SEP]", "差" * 60, ""]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>"]


def byte_level(frame: str) -> transformers.PreTrainedTokenizerFast:
    """A BPE whose tokenizer.json frames texts like that."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIALS,
        show_progress=False))  # fmt: skip
    ids = [(name, backend.token_to_id(name)) for name in SPECIALS]
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="[PAD]", split_special_tokens=True
    )


def bert(path: Path) -> None:
    """vocab.txt alone, as the hub's Chinese GPT-2s have it."""
    characters = dict.fromkeys("".join(text for _, text in reviews(60)) + "房间很好，服务差。nicehotl")
    lines = [*SPECIALS[:5], *characters, *(f"##{c}" for c in "nicehotl")]
    (path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def base(path: Path, frame: str) -> transformers.PreTrainedTokenizerBase:
    """A random GPT-2 with such a tokenizer, and what transformers reads there."""
    path.mkdir()
    bert(path) if frame == "BERT" else byte_level(frame).save_pretrained(path)
    kind = transformers.BertTokenizer if frame == "BERT" else transformers.AutoTokenizer
    hub = kind.from_pretrained(path)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=40, vocab_size=len(hub), eos_token_id=hub.convert_tokens_to_ids(
            "[SEP]" if frame == "BERT" else "</s>"), bos_token_id=None)).save_pretrained(path)  # fmt: skip
    return hub


FRAMES = {"<s> $A": ["</s>"], "<s> $A </s>": [], "[CLS] $A [SEP]": [], "BERT": [], "$A </s>": [], "$A": ["</s>"]}
"""Frame -> what stands behind a text as well: the token that ended texts in pretraining, where the frame has none."""


@pytest.mark.bf16
@pytest.mark.parametrize("frame", FRAMES)
def test_texts_stand_in_the_frame_of_the_models_own_tokenizer(miaobi, tmp_path, frame):
    """In training, in prediction, and where transformers reads the classifier."""
    hub = base(tmp_path / "base", frame)
    write(tmp_path / "reviews.csv", reviews(60))
    answer = miaobi("classify", "train", f"--base_model={tmp_path / 'base'}", f"--data={tmp_path / 'reviews.csv'}",
                    f"--out_dir={tmp_path / 'run'}", "--max_epoch=1", "--baselines=False", "--device=cpu",
                    "--dtype=float32", "--trainable=head", "--long_texts=truncate")  # fmt: skip
    assert answer.code == 0, answer.err
    judge = head.load(tmp_path / "run", torch.device("cpu"), torch.float32)
    rows, _ = judge.reading.rows(TEXTS, judge.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoints" / "best")
    tail = hub.convert_tokens_to_ids(FRAMES[frame])
    for text, row in zip(TEXTS, rows, strict=True):
        ids = hub(text, split_special_tokens=True, max_length=40 - len(tail), truncation=True).input_ids + tail
        assert row.tolist() == ids
        assert theirs(text, split_special_tokens=True, max_length=40, truncation=True).input_ids == ids
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoints" / "best")
    found = json.loads(miaobi("classify", "predict", tmp_path / "run", TEXTS[0], "--json", "--device=cpu",
                              "--dtype=float32").out)  # fmt: skip
    with torch.no_grad():
        logits = model(**theirs(TEXTS[0], return_tensors="pt")).logits[0] / judge.temperature
    (prediction,) = found["predictions"]
    assert list(prediction["probabilities"].values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-3)


def test_a_frame_does_not_make_a_classifier_one_of_small_gpts(miaobi, tmp_path):
    """Its own marks do: as-published puts them around the texts of any other base."""
    base(tmp_path / "base", "<s> $A")
    write(tmp_path / "reviews.csv", reviews(60))
    flags = [f"--data={tmp_path / 'reviews.csv'}", "--max_epoch=1", "--baselines=False", "--device=cpu",
             "--trainable=head"]  # fmt: skip
    miaobi("classify", "train", f"--base_model={tmp_path / 'base'}", f"--out_dir={tmp_path / 'a'}", *flags)
    answer = miaobi("classify", "train", f"--base_model={tmp_path / 'a'}", f"--out_dir={tmp_path / 'b'}", *flags,
                    "--protocol=as-published")  # fmt: skip
    assert answer.code == 0, answer.err
    judge = head.load(tmp_path / "b", torch.device("cpu"), torch.float32)
    names = [judge.tokenizer.backend.id_to_token(i) for i in (*judge.reading.before, *judge.reading.after)]
    assert names == ["<start>", "<extract>"]

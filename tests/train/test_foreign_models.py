"""Models as transformers writes them, used from end to end: sampled, evaluated, trained further, loaded there again."""

import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from miaobi.corpus.template import CHATML_TEMPLATE, ChatTemplate
from miaobi.corpus.tokenizer import IM_END, IM_START, Tokenizer
from miaobi.errors import UserError
from miaobi.generate.engine import load
from miaobi.generate.slots import Slots
from miaobi.model.checkpoint import model_directory
from miaobi.model.generation import end_ids

BLOCK = 64
TEXT = "皇马赢得比赛。hello world，球迷期待冠军！\n\n曼联输掉联赛，主教练谈到转会。\n\n"
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def byte_level(directory: Path) -> int:
    """A tokenizer.json as Qwen and Llama 3 have it; its vocabulary size."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learner = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], learner)
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)
    return len(fast)


def sentence_piece(directory: Path) -> int:
    """A tokenizer.json as Llama 2 has it: a blank in front of every word, the first one too; its vocabulary size."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    merges = [("▁", "h"), ("▁h", "e"), ("▁", "w"), ("▁w", "o")]
    vocab = {piece: id_ for id_, piece in enumerate(pieces + ["".join(pair) for pair in merges])}
    model = tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend, decoders = tokenizers.Tokenizer(model), tokenizers.decoders
    normalizers = tokenizers.normalizers
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(directory)
    return len(vocab)


def bert(directory: Path) -> int:
    """vocab.txt and tokenizer_config.json as uer/gpt2-chinese-cluecorpussmall has them; its vocabulary size."""
    words = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", *TEXT.replace("\n", "")])
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    config = {"do_lower_case": False, "tokenizer_class": "BertTokenizer", "model_max_length": BLOCK}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(words)


def gpt2(directory: Path) -> transformers.PreTrainedModel:
    """With vocab.txt and pytorch_model.bin, and no word on what ends a text."""
    size = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "n_positions": BLOCK,
        "n_ctx": BLOCK,
        "vocab_size": bert(directory),
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
    config = size | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return model


SMALL = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
    "intermediate_size": 64, "max_position_embeddings": BLOCK,
}  # fmt: skip


def qwen3(directory: Path) -> transformers.PreTrainedModel:
    """In bf16 and shards, tied, with spare rows, and two tokens that end a turn."""
    size = byte_level(directory)
    config = transformers.Qwen3Config(**SMALL, head_dim=16, vocab_size=size + 19, tie_word_embeddings=True)
    config.eos_token_id = size - 1
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    model.generation_config.eos_token_id = [size - 1, size - 2]
    model.save_pretrained(directory, max_shard_size="20KB")
    assert (directory / "model.safetensors.index.json").exists()
    return model.float()


def llama(directory: Path) -> transformers.PreTrainedModel:
    """With stretched angles and an output layer of its own."""
    size = byte_level(directory)
    config = transformers.LlamaConfig(**SMALL, vocab_size=size, rope_parameters=LLAMA3_ROPE, eos_token_id=size - 1)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model


def llama2(directory: Path) -> transformers.PreTrainedModel:
    """With the tokenizer of Llama 2."""
    config = transformers.LlamaConfig(**SMALL, vocab_size=sentence_piece(directory), eos_token_id=2, bos_token_id=1)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model


@pytest.fixture(params=[gpt2, qwen3, llama], ids=lambda write: write.__name__)
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, transformers.PreTrainedModel]:
    """A model directory of the hub, and its model in transformers."""
    (directory := tmp_path / "foreign").mkdir()
    torch.manual_seed(0)
    return directory, request.param(directory).eval()


def test_sample_writes_what_transformers_writes(foreign, miaobi):
    directory, theirs = foreign
    flags = ["--num_samples=1", "--max_new_tokens=20", "--temperature=0", "--device=cpu", "--dtype=float32", "--json"]
    answer = miaobi("sample", directory, "--start=皇马hello", *flags)
    assert answer.code == 0, answer.err
    tokenizer = load(directory, device="cpu").tokenizer
    prompt = tokenizer.encode("皇马hello")
    theirs.generation_config.eos_token_id = tokenizer.eot_id
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
    written = [id_ for id_ in ids[len(prompt) :] if id_ != tokenizer.eot_id]
    assert json.loads(answer.out)["samples"][0]["text"] == tokenizer.decode(prompt + written)


class Memory:
    """Slots whose stream gets the ids of a text."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.free, self.streams = ids, 1, []

    def add(self, stream) -> None:
        self.streams, stream.left = [stream], len(self.ids)

    def end(self, stream) -> None:
        self.streams = []

    write = Slots.write

    def advance(self) -> list:
        return [(stream, self.token(stream)) for stream in self.streams]

    def token(self, stream) -> int:
        stream.left -= 1
        return self.ids[-stream.left - 1]


@pytest.mark.parametrize(
    ("write", "text", "cut"),
    [
        (llama2, "hello world", 5), (llama2, "hello  world", 6), (llama2, "hello world", 0),
        (llama2, "你好中国 hello", 3), (llama2, "2 中国", 1), (gpt2, "hello world", 5), (gpt2, "hello world", 6),
        (gpt2, "皇马hello world", 7), (gpt2, "hello world", 0), (qwen3, "hello world", 5), (qwen3, "皇马 hello", 2),
    ],
)  # fmt: skip
def test_the_blank_between_prompt_and_continuation_is_written(tmp_path, write, text, cut, monkeypatch):
    """SentencePiece and BERT leave it away before the first word, and a continuation's first word is not a text's."""
    write(tmp_path)
    lm = load(tmp_path, device="cpu")
    prompt = text[:cut]
    ids = lm.tokenizer.encode(text)[len(lm.tokenizer.encode(prompt)) :]
    monkeypatch.setattr(lm, "slots", lambda size=1: Memory(ids))
    completion = lm.generate(prompt, num_samples=1, max_new_tokens=99)[0]
    assert completion.text == prompt + "".join(lm.stream(prompt, max_new_tokens=99)) == text
    stopped = lm.generate(prompt, num_samples=1, max_new_tokens=99, stop=(text[cut:][:2],))[0]
    assert (stopped.text, stopped.finish_reason) == (prompt, "stop"), "it is looked for where the text is shown"


@pytest.mark.parametrize("context", [32, 1000])
def test_text_behind_a_long_prompt_is_the_end_of_the_whole_text(tmp_path, context):
    sentence_piece(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = "hello 中国 world " * context
    ids = tokenizer.encode(text)
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(ids) == hub.decode(ids) == text
    for cut in range(len(ids) - 20, len(ids)):
        assert text.startswith(tokenizer.decode_stable(ids[:cut]))
    cut = len(tokenizer.encode(text[:-9]))
    assert text[:-9] + tokenizer.decode(ids[cut:], ids[:cut]) == text


def test_one_byte_that_fits_nothing_spoils_no_character_before_it(tmp_path):
    sentence_piece(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    broken = [*tokenizer.encode("中"), tokenizer.token_to_id("<0xE5>"), tokenizer.token_to_id("A")]
    assert tokenizer.decode(broken) == tokenizer.decode_stable(broken) == "中\ufffdA"


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_tuned_model_begins_and_is_sampled_as_its_makers_said(foreign, train, corpus_file, tmp_path, trainable):
    """Only what ends a text is added to. The second command goes on from the first one's checkpoint."""
    directory, theirs = foreign
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    generation = {"bos_token_id": 3, "eos_token_id": [5, 2], "pad_token_id": 4, **settings}
    for name, kept in (("config", {"bos_token_id": 3}), ("generation_config", generation)):
        file = directory / f"{name}.json"
        told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps(told | kept), encoding="utf-8")
    sizes = {"n_layer": theirs.config.num_hidden_layers, "n_head": theirs.config.num_attention_heads}
    for max_iters in (1, 2):
        train(data=corpus_file, out_dir=tmp_path / "run", init_from=directory, trainable=trainable, max_iters=max_iters,
              block_size=16, n_embd=theirs.config.hidden_size, **sizes)  # fmt: skip
    tuned = model_directory(tmp_path / "run", "last")
    found = transformers.GenerationConfig.from_pretrained(tuned)
    assert {key: getattr(found, key) for key in settings} == settings
    assert {5, 2} < set(found.eos_token_id)
    assert found.bos_token_id == transformers.AutoConfig.from_pretrained(tuned).bos_token_id == 3
    assert found.pad_token_id == (4 if load(tuned, device="cpu").tokenizer.pad_id is None else found.pad_token_id)


def test_eval_scores_what_transformers_scores(foreign, miaobi, tmp_path):
    directory, theirs = foreign
    (tmp_path / "text.txt").write_text("皇马赢得比赛。", encoding="utf-8")
    answer = miaobi("eval", directory, tmp_path / "text.txt", "--device=cpu", "--json")
    assert answer.code == 0, answer.err
    tokenizer = load(directory, device="cpu").tokenizer
    documents = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("eos_token_id") is not None
    begin = tokenizer.begin_ids or [tokenizer.eot_id]  # BERT's [CLS]
    ids = [*begin, *tokenizer.encode("皇马赢得比赛。"), *([tokenizer.eot_id] if documents else [])]
    with torch.no_grad():
        loss = theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    result = json.loads(answer.out)
    assert result["tokens"] == len(ids) - 1
    assert math.isclose(result["loss"], loss, rel_tol=1e-4)
    assert math.isclose(result["bits_per_char"], loss * (len(ids) - 1) / math.log(2) / 7, rel_tol=1e-4)


@pytest.fixture
def continued(foreign, tmp_path: Path) -> tuple[Path, Path]:
    """(what it started from, a model directory after some steps of training on raw text)."""
    from miaobi.settings import load_config
    from miaobi.train.loop import train as train_run

    (tmp_path / "text.txt").write_text(TEXT * 60, encoding="utf-8")
    flags = {
        "data": tmp_path / "text.txt", "out_dir": tmp_path / "run", "init_from": foreign[0], "dedup": "none",
        "batch_size": 4, "max_iters": 12, "eval_interval": 6, "eval_iters": 2, "sample_tokens": 0, "device": "cpu",
        "dtype": "float32", "compile": False, "muon_learning_rate": 0.002, "learning_rate": 1e-3,
    }  # fmt: skip
    result = train_run(*load_config(None, [(key, str(value)) for key, value in flags.items()]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert result["stopped"] == "max_iters"
    assert losses[-1] < losses[0], "it learns"
    return foreign[0], model_directory(tmp_path / "run", "last")


def test_a_model_trained_further_loads_in_transformers_again(continued):
    before, after = continued
    ours, theirs = load(after, device="cpu", dtype="float32"), transformers.AutoModelForCausalLM.from_pretrained(after)
    ids = torch.arange(40)[None] % 30
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, ours.logits(ids), atol=1e-4, rtol=1e-4)
    was, now = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (before, after))
    for key in ("architectures", "vocab_size", "rope_parameters", "max_position_embeddings", "head_dim", "n_positions",
                "num_key_value_heads", "activation_function"):  # fmt: skip
        assert now.get(key) == was.get(key), key
    assert now.get("tie_word_embeddings") == was.get("tie_word_embeddings", True)
    tokenizer = load(before, device="cpu").tokenizer
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(after)
    for text in (TEXT, "皇马[SEP]<|im_end|> hello world😀"):
        assert ours.tokenizer.encode(text) == tokenizer.encode(text)
        assert their_tokenizer(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (ours.tokenizer.eot_id, ours.tokenizer.pad_id) == (tokenizer.eot_id, tokenizer.pad_id)
    assert set(end_ids(after)) == {*end_ids(before), tokenizer.eot_id}, "what ended a text still does"


def test_a_shorter_block_than_the_hubs_may_be_trained(foreign, train, tmp_path):
    directory, theirs = foreign
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    shape = {"n_layer": 2, "n_embd": 32, "n_head": theirs.config.num_attention_heads}
    flags = {"data": tmp_path / "text.txt", "init_from": directory, "dedup": "none", "max_iters": 2} | shape
    train(**flags, out_dir=tmp_path / "run", block_size=24)
    result = train(**flags | {"max_iters": 3}, out_dir=tmp_path / "run", block_size=24)
    assert result["step"] == 3, "and the run goes on with it"
    after = model_directory(tmp_path / "run", "last")
    assert load(after, device="cpu").model.cfg.block_size == 24
    ids = torch.arange(24)[None] % 30
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(after).eval()(ids).logits
    torch.testing.assert_close(logits, load(after, device="cpu", dtype="float32").logits(ids), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=f"has block_size={BLOCK}, but block_size={BLOCK + 1} was given"):
        train(**flags, out_dir=tmp_path / "other", block_size=BLOCK + 1)


def test_the_tokens_that_end_a_text(tmp_path):
    assert end_ids(tmp_path) == ()
    for file, named, ids in [
        ("config.json", None, ()), ("config.json", 7, (7,)), ("generation_config.json", None, (7,)),
        ("generation_config.json", [1, 2], (1, 2)), ("generation_config.json", 0, (0,)),
    ]:  # fmt: skip
        (tmp_path / file).write_text(json.dumps({"eos_token_id": named}), encoding="utf-8")
        assert end_ids(tmp_path) == ids
    for impossible in ('"x"', "true", "-1", "[[1]]", "1e3", "9" * 40):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {impossible}}}', encoding="utf-8")
        assert end_ids(tmp_path) == (7,), "what config.json says"
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json.*is not JSON"):
        end_ids(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(foreign):
    directory, theirs = foreign
    extra = 40
    names = {f"<extra_{i}>": i for i in range(extra)}
    if (directory / "tokenizer.json").exists():
        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        backend.add_tokens(list(names))
        backend.save(str(directory / "tokenizer.json"))
    else:
        with (directory / "vocab.txt").open("a", encoding="utf-8") as f:
            f.write("\n".join(names) + "\n")
    with pytest.raises(UserError, match=rf"config\.json says vocab_size is {theirs.config.vocab_size}"):
        load(directory)


# --- new control tokens

HELLO = [{"role": "user", "content": "皇马赢得比赛"}, {"role": "assistant", "content": "球迷期待冠军"}]


def byte_gpt2(directory: Path) -> transformers.PreTrainedModel:
    """GPT-2's kind of vocabulary, vocab.json and merges.txt, and an output layer of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.model.save(str(directory))
    config = transformers.LlamaConfig(**SMALL, vocab_size=backend.get_vocab_size(), eos_token_id=0, bos_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("write", [gpt2, byte_gpt2], ids=["bert", "gpt2"])
def test_a_base_without_control_tokens_learns_to_chat(write, train, tmp_path, capsys):
    (directory := tmp_path / "base").mkdir()
    torch.manual_seed(0)
    theirs = write(directory)
    size = theirs.config.vocab_size
    lines = [json.dumps({"messages": [HELLO[0] | {"content": "皇马" * (1 + i % 9)}, HELLO[1]]}) for i in range(60)]
    (tmp_path / "sft.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {"data": tmp_path / "sft.jsonl", "format": "dialogue", "loss": "assistant", "init_from": directory,
                "out_dir": tmp_path / "run", "block_size": 64, "max_iters": 4, "dedup": "none",
                "n_layer": 2, "n_head": theirs.config.num_attention_heads, "n_embd": 32}  # fmt: skip
    with pytest.raises(UserError, match="LoRA leaves the rows of tokens as they are"):
        train(**settings | {"trainable": "lora", "out_dir": tmp_path / "lora"})
    train(**settings)
    assert f"the tokenizer has no {IM_START}, {IM_END}: added at {size}" in capsys.readouterr().err
    tuned = model_directory(tmp_path / "run", "last")
    ours = load(tuned, device="cpu", dtype="float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(tuned).eval()
    assert again.config.vocab_size == again.get_input_embeddings().num_embeddings == size + 2
    assert ours.tokenizer.token_to_id(IM_END) == size + 1 == end_ids(tuned)[-1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    assert tokenizer.chat_template == CHATML_TEMPLATE
    for messages, prompt in ((HELLO[:1], True), (HELLO, False)):
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False))
        assert ids == ChatTemplate.of(ours.tokenizer).encode(messages, add_generation_prompt=prompt)
    with torch.no_grad():
        torch.testing.assert_close(
            again(torch.tensor([ids])).logits, ours.logits(torch.tensor([ids])), atol=1e-4, rtol=1e-4
        )
    begun = theirs.get_input_embeddings().weight[:size].mean(0)
    rows = again.get_input_embeddings().weight[size:]
    assert (rows - begun).abs().max() < 0.1, "they begin as the mean"
    assert (rows - begun).abs().max() > 0, "and are learned"
    train(**settings | {"max_iters": 6})  # goes on from its own checkpoint

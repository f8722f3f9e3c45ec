"""What `train` writes is a Hugging Face model directory: transformers reads trained models and their tokenizers."""

import pytest
import torch
import transformers

from miaobi.generate.engine import load
from miaobi.model.checkpoint import model_directory

KINDS = [("gpt2", "char"), ("gpt2", "bpe"), ("qwen3", "char"), ("qwen3", "bpe")]
ODD_TEXT = "皇马\n\n赢得😀🐉👨‍👩‍👧 𠮷野家𡃁 龘 <sep><|im_end|><|endoftext|><pad><0x41>é\u0000\tx  "
TEXTS = [ODD_TEXT, "皇马赢得比赛，曼联输掉冠军。", "", " 空格  两个 ", "<0xF0><sep>", "\u200d\ufeff\u3000", "a\r\nb",
         "龘" * 40]  # fmt: skip
BLOCK = 32


@pytest.mark.parametrize(("family", "tokenizer"), KINDS)
def test_ids_and_logits_of_a_trained_model_are_equal_in_transformers(trained, family, tokenizer):
    path = model_directory(trained(family, tokenizer))
    ours = load(path, device="cpu", dtype="float32")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for text in TEXTS:
        ids = ours.tokenizer.encode(text)
        assert their_tokenizer(text, add_special_tokens=False).input_ids == ids
        assert their_tokenizer(text).input_ids == ids, "nothing is added where nothing was asked for"
        assert their_tokenizer.decode(ids) == ours.tokenizer.decode(ids) == text
        for window in torch.tensor(ids).split(BLOCK):
            if len(window):
                with torch.no_grad():
                    logits = theirs.eval()(window[None]).logits
                torch.testing.assert_close(logits, ours.logits(window[None]), atol=1e-4, rtol=1e-4)
    specials = {ours.tokenizer.eot_id, ours.tokenizer.pad_id, ours.tokenizer.sep_id}
    assert not specials & set(ours.tokenizer.encode(ODD_TEXT)), "literal specials in text stay text"


@pytest.mark.parametrize(("family", "tokenizer"), [("gpt2", "bpe"), ("qwen3", "char")])
def test_a_transformers_pipeline_writes_what_miaobi_writes(trained, family, tokenizer):
    path = model_directory(trained(family, tokenizer))
    theirs = transformers.pipeline("text-generation", str(path), device="cpu", dtype=torch.float32)
    text = theirs("皇马", max_new_tokens=12, do_sample=False, return_full_text=True)[0]["generated_text"]
    ours = load(path, device="cpu", dtype="float32")
    assert ours.generate("皇马", num_samples=1, max_new_tokens=12, temperature=0)[0].text == text


def test_the_end_of_text_is_known_to_transformers(trained):
    path = model_directory(trained("qwen3", "char"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path)
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert tokenizer.eos_token_id == config.eos_token_id == generation.eos_token_id
    assert tokenizer.pad_token_id is not None
    assert tokenizer.model_max_length == BLOCK

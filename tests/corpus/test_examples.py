"""What a chat template makes of dialogues in training, against transformers' prompts and dialogues."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.examples import TrainingTemplate
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.template import CHATML_TEMPLATE, ChatTemplate
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" %}{%- set ns.last = index %}{%- set ns.found = true %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"""
SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

ASK = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好，吃了吗？"},
       {"role": "user", "content": "吃了\n两碗"}, {"role": "assistant", "content": "好 😀"}]  # fmt: skip
SYSTEM = {"role": "system", "content": "简短"}
THOUGHT = [ASK[0], ASK[1] | {"reasoning_content": "先问好"}, ASK[2], ASK[3] | {"reasoning_content": "两碗不少"}]
INSIDE = [*ASK[:3], {"role": "assistant", "content": "<think>\n两碗\n</think>\n\n好"}]
CALL = {"type": "function", "function": {"name": "天气", "arguments": {"城": "北京"}}}
TOOLS = [{"type": "function", "function": {"name": "天气", "description": "查", "parameters": {"type": "object"}}}]
USED = [ASK[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "今天晴"}, ASK[2], ASK[3]]  # fmt: skip
DIALOGUES = {"plain": ASK, "system": [SYSTEM, *ASK], "thoughts": THOUGHT, "inside": INSIDE, "tools": USED,
             "one": ASK[:2], "open": ASK[:3]}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """`hub(template)`: a model directory of the hub's kind, byte-level BPE with control tokens, special and not."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    draw = random.Random(0)
    lines = ["".join(draw.choices("你我他好吃了吗在两碗饭 abc，。？\n", k=30)) for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(lines + ["user\n", "assistant\n"] * 9, trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    backend.add_tokens([AddedToken(name, normalized=False) for name in WORDS])
    known: dict[str, Path] = {}

    def get(template: str) -> Path:
        if template not in known:
            home = known[template] = tmp_path_factory.mktemp("hub")
            backend.save(str(home / "tokenizer.json"))
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                      "chat_template": template}  # fmt: skip
            (home / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return known[template]

    return get


def theirs(directory: Path, messages: list[dict], **options: object) -> list[int]:
    tools = messages[0].get("tools") if messages else None
    shown = [{key: value for key, value in m.items() if key not in ("tools", "weight")} for m in messages]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return list(tokenizer.apply_chat_template(shown, tools=tools, return_dict=False, **options))


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("name", DIALOGUES)
def test_every_reply_is_learned_behind_the_prompt_that_a_chat_writes(hub, name, thinking):
    directory, messages = hub(QWEN3), DIALOGUES[name]
    if name == "tools":
        messages = [messages[0] | {"tools": TOOLS}, *messages[1:]]
    tokenizer, options = Tokenizer.load(directory), {} if thinking is None else {"enable_thinking": thinking}
    template = TrainingTemplate.of(tokenizer, thinking)
    expected = {}
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = theirs(directory, messages[:i], add_generation_prompt=True, **options)
            whole = theirs(directory, messages[: i + 1], **options)
            if whole[: len(prompt)] != prompt:  # a thought, though the chat was told not to think
                assert thinking is False
                assert name in ("thoughts", "inside")
                with pytest.raises(UserError, match="begins a reply otherwise than its own prompt"):
                    template.examples(messages)
                return
            end = len(whole) - 1 - whole[::-1].index(tokenizer.token_to_id("<|im_end|>"))
            expected[tuple(prompt)] = whole[len(prompt) : end + 1]
            assert ChatTemplate.of(tokenizer, thinking).encode(messages[:i], add_generation_prompt=True) == prompt
    found = {}
    for example in template.examples(messages):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], example.is_reply, [0]))))
        for start, end in edges.reshape(-1, 2):
            assert tuple(example.ids[:start]) not in found, "a reply is learned twice"
            found[tuple(example.ids[:start])] = example.ids[start:end]
    assert found == expected


# Other families, as their directories on the hub have them, without what only tools need.
KINDS = {
    "Llama 3": (  # content trimmed, two newlines behind the header
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\n\n' + m.content | trim + "
        "'</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"),
    "Mistral": (  # alternating; the system's words go into the last question; no prompt of its own; a blank in front
        "{% if messages[0].role == 'system' %}{% set told = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{% if told and (loop.last or (loop.revindex == 2 and turns[-1].role != 'user')) %}"
        "{{ '[INST] ' + told + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% endif %}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"),
    "Llama 2": (  # the system's words in front of the first question
        "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set told = '<<SYS>>\n' + "
        "messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set turns = messages %}{% set told = '' %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ((told if loop.first else '') + "
        "m.content) | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"),
    "Gemma": (  # another name for the assistant, no system
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not "
        "supported') }}{% endif %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
        "m.content | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"),
    "GLM-4": (  # nothing ends a turn but the next one; the newline belongs to the reply
        "{{ '<s>' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"),
    "DeepSeek R1, first form": (  # thoughts are left out of every reply
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
        "{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% endif %}{% if m.role == 'assistant' %}"
        "{{ '<|im_end|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"),
    "QwQ": (  # the prompt begins the thought; old thoughts are left out
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"),
    "DeepSeek R1": (  # both: the prompt begins a thought that no reply keeps
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
        "{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% endif %}{% if m.role == 'assistant' %}"
        "{{ '<|im_end|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|><think>\n' }}{% endif %}"),
}  # fmt: skip
OPENED = [ASK[0], {"role": "assistant", "content": "<think>\n先问\n</think>\n\n你好呀"}, ASK[2],
          {"role": "assistant", "content": "<think>\n两碗\n</think>\n\n好 😀"}]  # fmt: skip
REFUSED = {("Gemma", "system"), ("QwQ", "plain"), ("QwQ", "system"), ("QwQ", "one"), ("DeepSeek R1", "plain"),
           ("DeepSeek R1", "system"), ("DeepSeek R1", "one")}  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "system", "one", "opened"])
@pytest.mark.parametrize("kind", KINDS)
def test_templates_of_every_family_are_trained_as_they_are_asked(hub, kind, name):
    """Every reply is learned once, whole, behind what transformers writes for a chat that has come so far."""
    directory, messages = hub(KINDS[kind]), OPENED if name == "opened" else DIALOGUES[name]
    tokenizer = Tokenizer.load(directory)
    template = TrainingTemplate.of(tokenizer)
    if (kind, name) in REFUSED:
        with pytest.raises(UserError, match=r"otherwise than its own prompt|System role not"):
            template.examples(messages)
        return
    replies = {i: m["content"] for i, m in enumerate(messages) if m["role"] == "assistant"}
    prompts = {tuple(theirs(directory, messages[:i], add_generation_prompt=True)): i for i in replies}
    for example in template.examples(messages):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], example.is_reply, [0]))))
        for start, end in edges.reshape(-1, 2):
            at = prompts.pop(tuple(example.ids[:start]))
            text = replies[at]
            if kind == "DeepSeek R1, first form":
                text = text.split("</think>")[-1]
            elif kind in ("QwQ", "DeepSeek R1"):
                text = text.removeprefix("<think>\n")
            learned = tokenizer.decode(example.ids[start:end])
            ends = ("</s>", "<|im_end|>", "<|im_start|>", " </s>", "")
            assert learned.lstrip(" \n") in {text.lstrip(" \n") + end for end in ends}
            assert learned[-1] == ">" or kind == "GLM-4"
    assert not prompts, "each was learned"


def test_a_template_that_says_the_same_at_every_turn_makes_one_example(hub):
    for source in (CHATML_TEMPLATE, LLAMA):
        directory = hub(source)
        template = TrainingTemplate.of(Tokenizer.load(directory))
        (example,) = template.examples(ASK)
        assert example.ids == theirs(directory, ASK)
        assert Tokenizer.load(directory).decode(np.array(example.ids)[example.is_reply]).count("吃了吗") == 1
        assert example.is_reply.sum() < len(example.ids)


def test_a_reply_without_weight_is_read_and_not_learned(hub):
    tokenizer = Tokenizer.load(hub(QWEN3))
    for weights, kept in (((0, 1), ["好 😀"]), ((1, 0), ["吃了吗"]), ((0, 0), [])):
        messages = [ASK[0], ASK[1] | {"weight": weights[0]}, ASK[2], ASK[3] | {"weight": weights[1]}]
        for source in (QWEN3, CHATML_TEMPLATE):
            examples = TrainingTemplate(source, tokenizer, False if source == QWEN3 else None).examples(messages)
            learned = "".join(tokenizer.decode(np.array(e.ids)[e.is_reply]) for e in examples)
            for word in ("吃了吗", "好 😀"):
                assert (word in learned) == (word in kept), (source, weights)


def test_what_a_template_takes_is_found_out_by_asking_it(hub):
    tokenizer = Tokenizer.load(hub(QWEN3))
    assert ChatTemplate(QWEN3, tokenizer).extras == {"tool", "tools", "tool_calls", "reasoning_content"}
    assert ChatTemplate(CHATML_TEMPLATE, tokenizer).extras == {"tool"}
    assert ChatTemplate(LLAMA, tokenizer).extras == {"tool"}
    strict = "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no') }}{% endif %}"
    assert ChatTemplate(strict + "{{ m.content }}{% endfor %}", tokenizer).extras == frozenset()


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("thinking", [None, False])
def test_prepared_dialogues_keep_thoughts_weights_and_tools(tmp_path, hub, thinking):
    used = [m for m in USED if "tool_calls" not in m or thinking is None]
    records = [{"messages": [ASK[0] | {"content": f"你好{i}"}, *ASK[1:]]} for i in range(30)]
    records += [{"messages": THOUGHT}, {"messages": used, "tools": TOOLS}] if thinking is None else []
    cfg = PrepareConfig(out=tmp_path / "out", tokenizer=str(hub(QWEN3)), format="dialogue", enable_thinking=thinking)
    prepare([str(write(tmp_path / "a.jsonl", records))], cfg)
    data, tokenizer = PreparedData.open(tmp_path / "out"), Tokenizer.load(tmp_path / "out")
    text = "".join(tokenizer.decode(s.read(0, len(s))) for s in (data.train, data.val))
    if thinking is None:
        for word in ("先问好", "两碗不少", '"城": "北京"', "<tool_response>\n晴", '"description": "查"'):
            assert word in text
    # The default is kept in the template: a chat, and transformers, ask as was trained.
    prompt = ChatTemplate.of(tokenizer).encode(ASK[:1], add_generation_prompt=True)
    assert prompt == theirs(tmp_path / "out", ASK[:1], add_generation_prompt=True)
    assert ("</think>" in tokenizer.decode(prompt)) == (thinking is False)
    both = theirs(tmp_path / "out", ASK[:1], add_generation_prompt=True, enable_thinking=True)
    assert ChatTemplate.of(tokenizer, True).encode(ASK[:1], add_generation_prompt=True) == both


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"messages": THOUGHT}, "turn 2 has `reasoning_content`"),
        ({"messages": ASK, "tools": TOOLS}, "turn 1 has `tools`"),
        ({"messages": USED}, "turn 2 has `tool_calls`"),
        ({"conversations": ASK, "functions": [{"name": "天气"}]}, "turn 1 has `functions`"),
        ({"messages": [ASK[0], {**ASK[1], "thinking": "先问好"}]}, "turn 2 has `thinking`"),
        (
            {"messages": [ASK[0], {"role": "assistant", "function_call": {"name": "天气", "arguments": "{}"}}]},
            "turn 2 has `function_call`",
        ),
        ({"instruction": "问", "output": "答", "reasoning": "想"}, "turn 2 has `reasoning`"),
    ],
)
def test_what_the_template_would_drop_is_refused_by_key_file_and_line(tmp_path, record, key):
    path = write(tmp_path / "a.jsonl", [{"messages": ASK}, record])
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: {key}, which the chat template does not render"):
        prepare([str(path)], PrepareConfig(out=tmp_path / "out", format="dialogue"))


def test_weights_are_refused_where_everything_is_learned(tmp_path):
    for key, value, settings in (("weight", 0, {"template": "sep"}), ("train", False, {"loss": "all"}),
                                 ("masked", True, {"loss": "all"})):  # fmt: skip
        path = write(tmp_path / "a.jsonl", [{"messages": [ASK[0], ASK[1] | {key: value}]}] * 2)
        with pytest.raises(UserError, match=rf"a\.jsonl, line 1: turn 2 has `{key}`, which asks not to learn it"):
            prepare([str(path)], PrepareConfig(out=tmp_path / "out", format="dialogue", **settings))

"""Chat templates against transformers' own, and what a user types against becoming a control token."""

import importlib.util
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.examples import TrainingTemplate
from miaobi.corpus.prepare import prepare
from miaobi.corpus.template import CHATML_TEMPLATE, SEP_TEMPLATE, ChatTemplate
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

ENDS = {"sep": ("<sep>", "<pad>"), "chatml": ("<|im_end|>", "<|im_end|>")}
CHAT = [("user", "你好"), ("assistant", "你好，吃了吗？"), ("user", "吃了 noodles\n两碗"), ("assistant", "好 😀")]
THOUGHT = [*CHAT[:3], ("assistant", "<think>\n两碗不少\n</think>\n\n够了"), ("user", "是吗")]


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


# --- tokenizers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """`ours("chatml", "bpe")`: a directory that `prepare` wrote."""
    known: dict[tuple[str, str], Path] = {}

    def get(template: str, kind: str) -> Path:
        if (template, kind) not in known:
            home = tmp_path_factory.mktemp(f"{template}-{kind}")
            draw = random.Random(0)
            lines = ["".join(draw.choices("你我他好吃了吗在两碗饭 abc，。？", k=9)) for _ in range(300)]
            text = "\n\n".join("\n".join(lines[i : i + 3]) for i in range(0, 300, 3))
            (home / "a.txt").write_text(text, encoding="utf-8")
            settings = {"vocab_size": 330} if kind == "bpe" else {}
            cfg = PrepareConfig(out=home / "out", format="dialogue", template=template, tokenizer=kind, **settings)
            prepare([str(home / "a.txt")], cfg)
            known[template, kind] = home / "out"
        return known[template, kind]

    return get


QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
TRICKS = """{{ bos_token }}{{ strftime_now('%Y') }}{{ pad_token | default('none') }}{{ cls_token }}
{% for message in messages %}
    {% if message['role'] == 'system' %}
{{ message | tojson(indent=1) }}{{ messages[0].content | tojson(ensure_ascii=True) }}
        {% continue %}
    {% endif %}
{{ '<|im_start|>' + message['role'] + ': ' }}
    {%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}
    {% else %}
{{ message['content'] | trim + eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"""
BLANK = (  # GPT-2's pieces put the blank in front of a reply into its first token
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """`hub(QWEN3)`: a directory as the hub has them, byte-level BPE with Qwen3's kinds of added tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = ["你好，吃了吗？吃了两碗面 user: assistant: system hello world noodles\n 你 好 够 是"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>", "<tool_call>"])
    known: dict[str, Path] = {}

    def get(template: str) -> Path:
        if template not in known:
            home = known[template] = tmp_path_factory.mktemp("hub")
            backend.save(str(home / "tokenizer.json"))
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>",
                      "cls_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
                      "chat_template": template}  # fmt: skip
            (home / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return known[template]

    return get


def theirs(directory: Path, messages: list[dict], **options: object) -> list[int]:
    return list(AutoTokenizer.from_pretrained(directory).apply_chat_template(messages, return_dict=False, **options))


# --- the ids of transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("template", ["sep", "chatml"])
def test_a_prepared_directory_renders_as_transformers_does(ours, template, kind):
    directory = ours(template, kind)
    rendering = TrainingTemplate.of(Tokenizer.load(directory))
    for end in range(1, len(CHAT) + 1):
        messages = chat(*CHAT[:end])
        for prompt in (False, True):
            assert rendering.encode(messages, prompt) == theirs(directory, messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("template", [QWEN3, TRICKS, BLANK])
def test_a_hub_models_own_template_renders_as_transformers_does(hub, template):
    directory = hub(template)
    rendering = TrainingTemplate.of(Tokenizer.load(directory))
    system, padded, blank = ("system", ' 你是 "妙笔" '), ("user", "  a\n"), ("user", " \n")
    for turns in (CHAT, CHAT[:1], [system, *CHAT], [padded, *CHAT[1:]], [blank, *CHAT[1:]], THOUGHT):
        messages = chat(*turns)
        if turns is not THOUGHT and not (template == TRICKS and turns[0] == system):  # those leave out and repeat
            assert rendering.render(messages).ids == rendering.encode(messages)
        for prompt in (False, True):
            assert rendering.encode(messages, prompt) == theirs(directory, messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("template", [TRICKS, BLANK])
def test_replies_are_the_ones_that_a_generation_block_marks(hub, template):
    """transformers finds them by `{% generation %}`, we without it."""
    directory = hub(template)
    messages = chat(*CHAT)
    answer = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    expected = np.array(answer["assistant_masks"], bool)
    rendered = TrainingTemplate.of(Tokenizer.load(directory)).render(messages)
    assert rendered.ids == answer["input_ids"]
    if template == BLANK:  # there the block stands around everybody's words
        ends = np.flatnonzero(np.array(rendered.ids) == Tokenizer.load(directory).token_to_id("<|im_end|>")) + 1
        users = [slice(0, ends[0]), slice(ends[1], ends[2])]
        for part in users:
            expected[part] = False
    assert expected.any()
    assert (rendered.is_reply == expected).all()


# --- templates of real models ---------------------------------------------------------------------------------------

OFFER = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]  # fmt: skip
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]
SPOKEN = {
    "plain": chat(*CHAT),
    "system": chat(("system", "你是助手。"), *CHAT[:2]),
    "thoughts inside": chat(("user", "一加一"), ("assistant", "<think>\n想想\n</think>\n\n二"), *THOUGHT[2:4]),
    "thoughts beside": [m | ({"reasoning_content": "想想"} if m["role"] == "assistant" else {}) for m in chat(*CHAT)],
    "tools": [
        {"role": "user", "content": "北京天气", "tools": OFFER},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "name": "weather", "content": "晴"},
        {"role": "assistant", "content": "晴天"},
    ],
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`real("qwen3")`: a tokenizer with a template of a real model, as TRL ships them, and its control tokens."""
    if (found := importlib.util.find_spec("trl")) is None:
        pytest.skip("TRL, which ships the templates, is not installed")

    def get(name: str) -> Path:
        source = (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        named = sorted(set(re.findall(r"<[|/]?[A-Za-z_|0-9]+[|]?>", source)))
        ordinary = [token for token in named if "think" in token or "tool" in token]
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
        backend.add_special_tokens(["<|end|>", *(token for token in named if token not in ordinary)])
        backend.add_tokens(ordinary)
        home = tmp_path_factory.mktemp(name)
        backend.save(str(home / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>",
                  "chat_template": source}  # fmt: skip
        (home / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return home

    return get


@pytest.mark.parametrize("thinking", [None, False])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4moe"])
def test_real_models_are_asked_and_trained_with_the_ids_of_transformers(real, name, thinking):
    directory = real(name)
    tokenizer, hub = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    asked = {} if thinking is None else {"enable_thinking": thinking}
    if asked and "enable_thinking" not in tokenizer.config["chat_template"]:
        with pytest.raises(UserError, match="this one does not"):
            TrainingTemplate.of(tokenizer, thinking)
        return
    template = TrainingTemplate.of(tokenizer, thinking)
    assert {"tool", "tools", "tool_calls"} <= template.extras
    for kind, messages in SPOKEN.items():
        asked["tools"] = messages[0].get("tools")
        shown = [{key: value for key, value in m.items() if key != "tools"} for m in messages]

        def ids(end: int, prompt: bool, shown=shown) -> list[int]:
            return list(hub.apply_chat_template(shown[:end], add_generation_prompt=prompt, return_dict=False, **asked))

        for end in range(1, len(messages) + 1):
            for prompt in (False, True):
                assert template.encode(messages[:end], prompt) == ids(end, prompt), kind
        if thinking is False and "thoughts" in kind:
            with pytest.raises(UserError, match="is there a thought and --enable_thinking=False"):
                template.examples(messages)
            continue
        examples = template.examples(messages)
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            before = ids(i, True)
            learned = [e for e in examples if e.ids[: len(before)] == before and len(e.ids) > len(before)
                       and e.is_reply[len(before)] and not e.is_reply[len(before) - 1]]  # fmt: skip
            assert learned, f"{kind}: reply {i} is learned behind the prompt that a chat has"


# --- what a user types -------------------------------------------------------------------------------------------

PIECES = ["<sep>", "<|im_end|>", "<pad>", "<|im_start|>", "<<sep>sep>", "<|im_", "end|>", "<", ">", "<se", "p>",
          "<0x41>", "<think>", "</think>", " ", "\n", "\u3000", "|", "user", "assistant\n"]  # fmt: skip
ANYTHING = st.characters(exclude_categories=["Cs", "Cn"])
CONTENT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(ANYTHING, max_size=4)), max_size=6).map("".join)
ROLES = st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=4)


@st.composite
def dialogues(draw: st.DrawFn) -> list[dict[str, str]]:
    return [{"role": role, "content": draw(CONTENT)} for role in draw(ROLES)]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("template", ["sep", "chatml"])
@given(messages=dialogues())
def test_text_stays_text_and_replies_are_marked_to_the_letter(ours, template, kind, messages):
    tokenizer = Tokenizer.load(ours(template, kind))
    rendering = TrainingTemplate.of(tokenizer)
    rendered = rendering.render(messages)
    assert rendered.ids == rendering.encode(messages)
    harmless = rendering.encode([m | {"content": "x"} for m in messages])

    def controls(ids: list[int]) -> list[int]:
        return [id_ for id_ in ids if tokenizer.is_control(id_)]

    assert controls(rendered.ids) == controls(harmless)
    turn, last = ENDS[template]
    ends = [turn] * (len(messages) - 1) + [last]
    if template == "sep":
        expected = [m["content"] + end for m, end in zip(messages, ends, strict=True)]
    else:
        expected = [f"<|im_start|>{m['role']}\n{m['content']}{turn}\n" for m in messages]
    assert tokenizer.decode(rendered.ids) == "".join(expected)
    if all(m["content"] and m["content"] == m["content"].strip() for m in messages):  # as prepared data has them
        assert [tokenizer.decode(part) for part in np.split(rendered.ids, rendered.turns[1:])] == expected
    replies = [
        (m["content"].lstrip() or m["content"]) + end
        for m, end in zip(messages, ends, strict=True)
        if m["role"] == "assistant"
    ]
    assert tokenizer.decode(np.array(rendered.ids)[rendered.is_reply]) == "".join(replies)


@given(messages=dialogues())
def test_users_make_no_control_token_of_a_hub_model(hub, messages):
    """`<think>` is not special there: the model may say it, a user cannot."""
    tokenizer = Tokenizer.load(hub(CHATML_TEMPLATE))
    ids = TrainingTemplate.of(tokenizer).encode(messages)
    named = {name: tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>", "<think>", "</think>")}
    spoken = "".join(m["content"] for m in messages if m["role"] == "assistant")
    for name, expected in (("<|im_start|>", len(messages)), ("<|im_end|>", len(messages))):
        assert ids.count(named[name]) == expected
    for name in ("<think>", "</think>"):
        assert ids.count(named[name]) == spoken.count(name)


@given(messages=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text("你好a1 。\n😀é", min_size=1)),
                         min_size=1, max_size=4))  # fmt: skip
def test_plain_words_give_the_ids_of_transformers(hub, messages):
    directory = hub(QWEN3)
    messages = chat(*messages)
    assert TrainingTemplate.of(Tokenizer.load(directory)).encode(messages) == theirs(directory, messages)


def with_token(name: str, template: str, *more: str) -> Tokenizer:
    backend = Tokenizer.train_char(dict.fromkeys("[END]你好 \n", 1)).backend
    backend.add_special_tokens([name, *more])
    return Tokenizer(backend, {"chat_template": template})


@pytest.mark.parametrize(
    ("before", "content", "after"),
    [("[", "END", "]"), ("[E", "ND]", ""), ("", "[EN", "D]"), ("[END", "]", ""), ("", "[", "END]"), ("[", "END]好", ""),
     ("[EN", " D]", ""), ("", "[END]", ""), ("", "[[END]END]", "")],
)  # fmt: skip
def test_template_and_text_together_make_no_control_token(before, content, after):
    for trim in ("", " | trim"):
        source = f"{{% for m in messages %}}{{{{ '{before}' + m.content{trim} + '{after}' }}}}{{% endfor %}}"
        tokenizer = with_token("[END]", source)
        rendering, messages = TrainingTemplate.of(tokenizer), chat(("user", content))
        ids = rendering.encode(messages)
        assert tokenizer.token_to_id("[END]") not in ids
        assert tokenizer.decode(ids) == before + (content.strip() if trim else content) + after
        assert rendering.render(messages).ids == ids
    honest = with_token("[END]", "{{ messages[0].content + '[END]' }}")
    assert TrainingTemplate.of(honest).encode(chat(("user", "好")))[-1] == honest.token_to_id("[END]")


def test_what_is_broken_up_makes_no_other_control_token():
    tokenizer = with_token("[END]", "{{ messages[0].content }}", "]好[")
    ids = TrainingTemplate.of(tokenizer).encode(chat(("user", "[END]好[")))
    assert not [id_ for id_ in ids if tokenizer.is_control(id_)]
    assert tokenizer.decode(ids) == "[END]好["


def test_a_letter_that_is_an_added_token_is_a_letter():
    """Some tokenizers list the newline so; it cannot be broken up and need not be."""
    tokenizer = with_token("\n", "{% for m in messages %}{{ m.content }}<sep>{% endfor %}")
    ids = TrainingTemplate.of(tokenizer).encode(chat(("user", "你\n<sep>好")))
    assert tokenizer.decode(ids) == "你\n<sep>好<sep>"
    assert ids.count(tokenizer.token_to_id("\n")) == 1
    assert ids.count(tokenizer.sep_id) == 1


def test_noncharacters_are_refused(ours):
    rendering = TrainingTemplate.of(Tokenizer.load(ours("sep", "char")))
    for number in range(0xFDD0, 0xFDF0):
        with pytest.raises(UserError, match=f"U\\+{number:04X}, which is not a character"):
            rendering.encode(chat(("user", f"你{chr(number)}好")))


# --- templates that fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    ["''.__class__.__mro__[1].__subclasses__()", "messages.__class__.x", "lipsum.__globals__['os'].system('CMD')",
     "cycler.__init__.__globals__.os.system('CMD')", "(messages | attr('__class__')).__mro__", "messages.append(1)",
     "self.__init__.__globals__", "namespace.__init__.__globals__['__builtins__'].open('FILE', 'w')",
     "'{0.__class__.__init__.__globals__}'.format(raise_exception)", "strftime_now.__globals__.os",
     "raise_exception('roles must alternate')", "1 / 0", "messages[99].content.x", "'a' + 1", "range(10**9) | list",
     "none.foo.bar", "messages | join(1, 2, 3, 4)"],
)  # fmt: skip
def test_a_template_that_fails_or_breaks_out_is_a_users_error_and_runs_nothing(ours, tmp_path, expression):
    witness = tmp_path / "witness"
    source = "{{ " + expression.replace("CMD", f"touch {witness}").replace("FILE", str(witness)) + " }}"
    rendering = TrainingTemplate(source, Tokenizer.load(ours("sep", "char")))
    for act in (rendering.encode, rendering.render):
        with pytest.raises(UserError, match="the chat template fails to render this dialogue"):
            act(chat(*CHAT))
    assert not witness.exists()


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'x }}", "{% unknown %}", "{% generation %}", "{{ 1 | no_such }}"])
def test_what_is_no_jinja_is_a_users_error(ours, source):
    with pytest.raises(UserError, match="not valid Jinja"):
        TrainingTemplate(source, Tokenizer.load(ours("sep", "char")))


ALL = "{% for m in messages %}{{ m.content }}<sep>{% endfor %}"
MOVED = (  # the system's words in front of the last question, as one family of hub models has it
    "{% for m in messages[1:] %}{% if loop.index == 3 %}{{ messages[0].content }}{% endif %}"
    "{{ m.content }}<sep>{% endfor %}"
)


@pytest.mark.parametrize("source", ["{{ messages[-1].content }}", ALL + "{{ messages[0].content }}", MOVED, "好"])
def test_a_template_that_drops_repeats_or_moves_messages_is_not_trained_on(ours, source):
    messages = chat(("system", "简短"), *CHAT)
    rendering = TrainingTemplate(source, Tokenizer.load(ours("sep", "char")))
    assert rendering.encode(messages)  # to talk with, it will do
    with pytest.raises(UserError, match="leaves messages out, repeats them or changes their order"):
        rendering.render(messages)


def test_the_sep_template_has_no_system(ours):
    with pytest.raises(UserError, match="two speakers alike and no system message"):
        ChatTemplate(SEP_TEMPLATE, Tokenizer.load(ours("sep", "char"))).encode(chat(("system", "简短"), *CHAT))


def test_which_template_a_directory_brings(ours):
    tokenizer = Tokenizer.load(ours("chatml", "char"))
    assert tokenizer.config["chat_template"] == CHATML_TEMPLATE
    expected = TrainingTemplate.of(tokenizer).encode(chat(*CHAT))
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML_TEMPLATE}]
    assert TrainingTemplate.of(Tokenizer(tokenizer.backend, {"chat_template": named})).encode(chat(*CHAT)) == expected
    for nothing in (None, "", [], named[:1], [{"template": "x"}], ["x"], 5):
        with pytest.raises(UserError, match="no chat template"):
            TrainingTemplate.of(Tokenizer(tokenizer.backend, {"chat_template": nothing}))

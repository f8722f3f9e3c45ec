"""Templates that would run for ever, or fill the memory."""

import os
import resource
import time

import pytest

from miaobi.corpus import rendering
from miaobi.corpus.template import ChatTemplate
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

HELLO = [{"role": "user", "content": "你好"}]
LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


@pytest.mark.parametrize(
    "source",
    ["{{ 'a' * 10**10 }}", "{{ ('a' * messages | length) * 10**10 }}", LOOPS, DOUBLING, CALLS,
     "{{ (10 ** 10) ** (10 ** 10) }}", "{{ 'a'.ljust(10**10) }}", "{{ 'x' | center(10**10) }}",
     "{{ '%10000000000d' % 1 }}", "{{ '{:>10000000000}'.format(1) }}",
     "{{ messages | batch(10**10, 'x') | list }}", "{{ messages | tojson(indent=10**10) }}",
     "{{ ('a' * 10**6).replace('a', 'a' * 10**6) }}", "{% for a in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}"],
)  # fmt: skip
def test_a_template_is_bounded_in_time_and_memory(source):
    tokenizer, began, before = Tokenizer.train_char({"你": 1}), time.process_time(), memory()
    with pytest.raises(UserError, match=r"the chat template (fails to render this dialogue|is not valid Jinja)"):
        ChatTemplate(source, tokenizer).encode(HELLO)
    assert time.process_time() - began < 5  # the child's own bound is of its processor time
    assert memory() - before < 256 << 20
    assert ChatTemplate("{{ messages[0].content }}!", tokenizer).encode(HELLO)  # and the next one is served


def memory() -> int:
    """Bytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_depth_and_odd_sources_are_users_errors():
    for source in (
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{{ " + "9" * 5000 + " }}",
    ):
        with pytest.raises(UserError, match="the chat template"):
            ChatTemplate(source, Tokenizer.train_char({"你": 1})).encode(HELLO)


def test_a_forked_worker_has_a_process_of_its_own():
    source = "{{ messages[0].content }}?"
    expected = rendering.render(source, [{"messages": HELLO}], is_ours=False)
    pid = os.fork()
    if not pid:
        os._exit(0 if rendering.render(source, [{"messages": HELLO}], is_ours=False) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert rendering.render(source, [{"messages": HELLO}], is_ours=False) == expected == ["你好?"]

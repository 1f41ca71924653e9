"""Chat templates against recorded renders and transformers; refusals; the sandbox."""

import copy
import datetime
import json
import shutil

import numpy as np
import pytest

from jaxllm import chat
from jaxllm.errors import TokenizerError
from jaxllm.tokenizer import load_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Say <weather> & more",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CONVERSATIONS = {
    "plain": HELLO,
    "system": [{"role": "system", "content": "Be brief, 你好."}, *HELLO],
    "turns": [*HELLO, {"role": "assistant", "content": " Hi "}, {"role": "user", "content": "<|im_end|>?"}],
    "tools": [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
            ],
        },
        {"role": "tool", "content": '{"t": 3}'},
    ],
    "reasoning": [*HELLO, {"role": "assistant", "content": "4", "thinking": "2+2"}, *HELLO],
}


@pytest.fixture(scope="session")
def templates(shared):
    return shared / "chat_templates"


@pytest.fixture(scope="session")
def tokenizers(shared):
    return {name: load_tokenizer(shared / "tokenizers" / name) for name in ("qwen2.5", "minimind", "gpt2")}


def test_recorded_renders(templates):
    golden = json.loads((templates / "golden_jinja_renders.json").read_text("utf-8"))
    variables = {
        "bos_token": golden["bos"],
        "eos_token": golden["eos"],
        "strftime_now": golden["strftime_now"],
        "date_string": golden["date_string"],
    }
    equal = refused = 0
    for name, cases in golden["renders"].items():
        source = (templates / name).read_text("utf-8")
        for case, wanted in cases.items():
            messages, tools = golden["conversations"][case.partition("+")[0]], None
            if case.endswith("+tools"):
                tools = golden["tools"]
            if wanted is None:
                with pytest.raises(TokenizerError, match=r"^The chat template"):
                    chat.render(source, messages, tools=tools, variables=variables)
                refused += 1
            else:
                assert chat.render(source, messages, tools=tools, variables=variables) == wanted, (name, case)
                equal += 1
    assert (equal, refused) == (104, 16)


def test_recorded_template_strings(templates):
    golden = json.loads((templates / "golden_chat_templates.json").read_text("utf-8"))
    assert len(golden["cases"]) == 33
    for case in golden["cases"]:
        wanted = case["hf_jinja_render"]
        kwargs = {
            "add_generation_prompt": golden["add_generation_prompt"],
            "variables": {"bos_token": case["bos_token"], "eos_token": case["eos_token"]},
        }
        if not wanted.startswith("ERR "):
            assert chat.render(case["template_str"], golden["conversation"], **kwargs) == wanted, case["name"]
            continue
        message = wanted.partition("(")[2].strip("'\")").replace("\\'", "'")
        with pytest.raises(TokenizerError) as caught:
            chat.render(case["template_str"], golden["conversation"], **kwargs)
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["qwen2.5", "minimind"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["bare", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(name, conversation, tools, prompt, templates, tokenizers, transformers_tokenizers):
    ours, theirs, messages = tokenizers[name], transformers_tokenizers[name], CONVERSATIONS[conversation]
    kwargs = {"tools": tools, "add_generation_prompt": prompt, "open_thinking": True}
    before, source = copy.deepcopy(messages), None
    if name == "qwen2.5":
        source = (templates / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text("utf-8")
    wanted = theirs.apply_chat_template(messages, tokenize=False, chat_template=source, **kwargs)
    assert ours.render_chat(messages, template=source, **kwargs) == wanted
    ids = theirs.apply_chat_template(messages, chat_template=source, **kwargs)["input_ids"]
    assert ours.encode_chat(messages, template=source, **kwargs) == ids
    assert messages == before


@pytest.fixture(scope="session")
def transformers_tokenizers(shared):
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoTokenizer.from_pretrained
    return {name: load(str(shared / "tokenizers" / name)) for name in ("qwen2.5", "minimind")}


SNIPPETS = [
    "{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}{{ m | tojson }}\n{% endfor %}",
    "{% for m in messages -%}\n  {% if loop.first %}{% continue %}{% endif %}\n  {{ m.content }}\n{% endfor %}",
    "{% generation %}{% set a = 1 %}{{ messages[0].content }}{% endgeneration %}[{{ a }}]",
    "{{ {'b': '<é>', 'a': [1, none]} | tojson(indent=2, sort_keys=true) }}{{ x | tojson(separators=(',', ':')) }}",
    "{% set ns = namespace(n=0, self=3) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro f(a) %}<{{ a }}>{% endmacro %}{{ f(x) }}{{ dict(a=1) }}{{ dict.fromkeys([1]) }}",
    "  {% if true %}\n  a\n  {% endif %}\n{{ messages[-1]['content'] | trim }}{{ bos_token }}",
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_snippets_equal_transformers(source):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": " a "}, {"role": "x", "content": "b"}]
    variables = {"x": {"k": [1.5, True, None, "&"]}, "bos_token": "<s>"}
    wanted, _ = utils.render_jinja_template([messages], chat_template=source, **variables)
    assert chat.render(source, messages, add_generation_prompt=False, variables=variables) == wanted[0]


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__.keys() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ dict.__init__.__globals__.x }}",
    "{{ dict.__call__.__func__.__globals__.json }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__x__ = 1 %}",
    "{{ namespace.__init__.__globals__.x }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_refused(source):
    with pytest.raises(TokenizerError, match=r"^The chat template"):
        chat.render(source, HELLO)


def test_forbidden_is_said(tokenizers):
    with pytest.raises(TokenizerError, match=r"sandbox forbids.*__globals__"):
        tokenizers["gpt2"].render_chat(HELLO, template="{{ raise_exception.__globals__.x }}")


def test_template_faults_are_sentences():
    with pytest.raises(TokenizerError, match=r"refused these messages: no users here"):
        chat.render("{{ raise_exception('no users here') }}", HELLO)
    with pytest.raises(TokenizerError, match=r"syntax error in line 2: .*endfor"):
        chat.render("{% for a in b %}\n{% endif %}", HELLO)
    with pytest.raises(TokenizerError, match="'nothing' is undefined"):
        chat.render("{{ nothing.more }}", HELLO)
    with pytest.raises(TokenizerError, match="TypeError"):
        chat.render("{{ 1 + 'a' }}", HELLO)


def test_bad_arguments_are_refused(tokenizers):
    tokenizer, source = tokenizers["gpt2"], "{{ messages }}"

    def get_weather(city: str) -> str:
        """A function, not a schema."""

    faults = [
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "messages should be a list of dicts, but got a str"),
        ({"messages": {"role": "user"}}, "but got a dict"),
        ({"messages": ["hi"]}, "but holds a str"),
        ({"messages": [{"role": "user", "content": np.zeros(3)}]}, "not a ndarray"),
        ({"tools": [get_weather]}, "tools should be .* JSON schema"),
        ({"tools": TOOL}, "tools should be a list of dicts, but got a dict"),
        ({"documents": ["text"]}, "documents should be"),
        ({"thing": object()}, "A template variable .* not a object"),
        ({"strftime_now": 3}, "strftime_now should be"),
        ({"template": 3}, "Jinja source, but got a int"),
    ]
    endless = [{"role": "user"}]
    endless[0]["content"] = endless
    faults += [({"messages": endless}, "nested too deep"), ({"messages": None}, "at least one message")]
    for arguments, match in faults:
        with pytest.raises(TokenizerError, match=match):
            tokenizer.render_chat(**{"messages": HELLO, "template": source} | arguments)
    with pytest.raises(TokenizerError, match="has no chat template"):
        tokenizer.render_chat(HELLO)


def test_values_the_template_sees():
    source = "{{ messages | tojson }}{{ x | tojson }}"
    messages = [{"role": "user", "content": None, "n": np.int64(3), "f": np.float32(0.5), "t": (1, 2)}]
    wanted = '[{"role": "user", "n": 3, "f": 0.5, "t": [1, 2]}]true'
    assert chat.render(source, messages, variables={"x": np.bool_(True)}) == wanted


def test_the_clock_can_be_set():
    source, day = "{{ strftime_now('%d %b %Y') }}", datetime.datetime(2024, 7, 26, 1, 2)
    for clock in (day, day.date(), "26 Jul 2024", day.strftime):
        assert chat.render(source, HELLO, variables={"strftime_now": clock}) == "26 Jul 2024"
    before = datetime.datetime.now()
    shown = chat.render("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}", HELLO)
    assert before <= datetime.datetime.fromisoformat(shown) <= datetime.datetime.now()


# --- where templates are found


@pytest.fixture
def folder(shared, tmp_path):
    shutil.copy(shared / "tokenizers/gpt2/tokenizer.json", tmp_path)
    return tmp_path


def configure(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def test_template_files(folder):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert load_tokenizer(folder).render_chat(HELLO) == "from json"
    assert configure(folder, chat_template="from config").render_chat(HELLO) == "from config"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert configure(folder, chat_template="from config").chat_template == "from jinja"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("from rag é", encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == {"default": "from jinja", "rag": "from rag é"}
    assert tokenizer.render_chat(HELLO, template="rag") == "from rag é"
    assert tokenizer.render_chat(HELLO, template="own {{ messages[0].role }}") == "own user"


def test_named_templates(folder):
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    tokenizer = configure(folder, chat_template=listed)
    assert tokenizer.render_chat(HELLO) == "plain"
    assert tokenizer.render_chat(HELLO, tools=[TOOL]) == "1"
    assert tokenizer.render_chat(HELLO, tools=[TOOL], template="default") == "plain"
    with pytest.raises(TokenizerError, match=r"\['a', 'b'\]; say which"):
        configure(folder, chat_template={"a": "x", "b": "y"}).render_chat(HELLO)


def test_special_tokens_and_variables_reach_the_template(folder):
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ additional_special_tokens }}{{ mood }}"
    names = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<end>"}, "pad_token": None}
    tokenizer = configure(folder, **names, additional_special_tokens=["<x>"], chat_template=source)
    assert tokenizer.render_chat(HELLO, mood="!") == "<|endoftext|>Hello<end>['<x>']!"
    assert tokenizer.render_chat(HELLO, bos_token="").startswith("Hello")
    ids = tokenizer.encode_chat(HELLO)
    assert (ids[0], ids[2], ids.count(50256)) == (50256, tokenizer.eos_id, 1)
    assert tokenizer.encode_chat(HELLO, bos_token="", mood="?") == tokenizer.encode("Hello<end>['<x>']?")


def test_nothing_is_added_around_a_rendered_chat(shared, tmp_path):
    shutil.copy(shared / "stories260K/tok512.model", tmp_path / "tokenizer.model")
    tokenizer = configure(tmp_path, chat_template="<s>{{ messages[0].content }}</s>")
    assert tokenizer.encode("Hello")[0] == 1
    assert tokenizer.encode_chat(HELLO) == [1, *tokenizer.encode("Hello", add_special=False), 2]

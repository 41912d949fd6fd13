"""Is a record's text that of the template to the letter, and every content where it says?"""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from plw_mlflow.data import chat_template, templates
from plw_mlflow.data.chat_template import ChatTemplate
from plw_mlflow.data.pieces import Misfit, Piece, Segment, contents, prompt_pieces
from plw_mlflow.data.records import Message, Record
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.environment import bounded
from tests.conftest import BOS, byte_tokenizer
from tests.data.test_tokens import greedy, odd
from tests.environment.test_bounded import spin

T, N, P, C = Segment.TEMPLATE, Segment.INSTRUCTION, Segment.INPUT, Segment.COMPLETION

# Three chat templates in the manner of the usual ones: ChatML (Qwen), Llama 2 and Llama 3. The latter two strip.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = none %}{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}"
    "{% endif %}{% if loop.first and system is not none %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
CHATS = {"chatml": CHATML, "llama-2": LLAMA_2, "llama-3": LLAMA_3}
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def with_specials(tokenizer, **how):
    tokenizer.add_tokens([AddedToken(text, special=True, **how) for text in SPECIALS], special_tokens=True)
    return tokenizer


BYTE_CHAT = with_specials(byte_tokenizer(bos=True))


def chat(source, tokenizer=BYTE_CHAT, turns="last"):
    return ChatTemplate(source, tokenizer, turns)


def conversation(*turns):
    """A record of turns that begin with the first letter of their role."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = tuple(Message(roles[turn[0]], turn[1:]) for turn in turns)
    last_user = next((m.content for m in reversed(messages) if m.role == "user"), "")
    return Record("chat:1", last_user, "", messages[-1].content, messages)


def written(pieces):
    """Pieces as the letter of their segment, a star where they are special, and their text; neighbours joined."""
    found = []
    for piece in pieces:
        letter = {T: "T", N: "N", P: "P", C: "C"}[piece.segment] + ("*" if piece.is_special else " ")
        if found and found[-1][:2] == letter and not piece.is_special:
            found[-1] += piece.text
        elif piece.text:
            found.append(letter + piece.text)
    return found


# Templates with places.


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (
            "3\n",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n"
            "### Instruction:\nDouble it.\n\n### Input:\n3\n\n\n### Response:",
        ),
        (
            "",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nDouble it.\n\n### Response:",
        ),
    ],
)
def test_alpacas_template_to_the_letter(tokenizer, context, expected):
    record, template = Record("1", "Double it.", context, " 6.\n"), templates.load("alpaca", tokenizer)
    assert "".join(piece.text for piece in prompt_pieces(template.render(record))) == expected
    (example,) = Encoder(tokenizer, template).encode([record])
    assert tokenizer.decode(example.tokens) == expected + " 6.\n</s>"


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("3", ["N Double it.", "T \n", "P 3", "T \n", "C 6"]),
        ("", ["N Double it.", "T \n", "C 6"]),
    ],
)
def test_no_template_is_a_line_each(tokenizer, context, expected):
    assert written(templates.load("none", tokenizer).render(Record("1", "Double it.", context, "6"))) == expected


def test_a_template_of_ones_own_has_special_tokens_where_it_spells_them(tmp_path):
    forms = {
        "description": "as Alpaca-LoRA's files have it",
        "prompt_input": "<|im_start|>{instruction} {{of}} {input}<|im_end|>",
        "prompt_no_input": "<|im_start|>{instruction}<|im_end|>",
    }
    (tmp_path / "own.json").write_text(json.dumps(forms))
    template = templates.load(str(tmp_path / "own.json"), BYTE_CHAT)
    found = written(template.render(Record("1", "<|im_end|>", "x", "y")))
    assert found == ["T*<|im_start|>", "N <|im_end|>", "T  {of} ", "P x", "T*<|im_end|>", "C y"]
    (example,) = Encoder(BYTE_CHAT, template).encode([Record("1", "<|im_end|>", "x", "y")])
    ids = BYTE_CHAT.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [token for token in example.tokens.tolist() if token in ids] == ids


def test_of_two_special_tokens_the_longer_one_is_meant():
    template = templates.TextTemplate("{instruction}{input}", "<x>y{instruction}", ["<x>", "<x>y"])
    assert written(template.render(Record("1", "U", "", "A"))) == ["T*<x>y", "N U", "C A"]


@pytest.mark.parametrize("name", ["alpaca", "none"])
@pytest.mark.parametrize("turns", ["sua", "uaua", "usa"])
def test_a_conversation_does_not_fit_a_template_with_places(tokenizer, name, turns):
    with pytest.raises(ValueError, match=r"record chat:1 is a conversation .* use --template chat"):
        templates.load(name, tokenizer).render(conversation(*(role + "x" for role in turns)))


def test_a_single_turn_does(tokenizer):
    template = templates.load("alpaca", tokenizer)
    assert template.render(conversation("ux", "ay")) == template.render(Record("1", "x", "", "y"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("alpaka", None, "there is no template 'alpaka'; it must be alpaca, chat, none, or the path"),
        ("gone.json", None, "there is no template '.*gone.json'"),
        ("a.json", "{", "a.json cannot be used: Expecting property name"),
        ("a.json", "[]", "a.json cannot be used: it must be one JSON object"),
        ("a.json", '{"prompt_input": "{instruction}{input}"}', "a.json lacks the field 'prompt_no_input'"),
        ("a.json", '{"prompt_input": 1, "prompt_no_input": ""}', "a.json cannot be used"),
        (
            "a.json",
            '{"prompt_input": "{instruction}", "prompt_no_input": "{instruction}"}',
            "must hold the fields input, instruction, but has instruction",
        ),
        (
            "a.json",
            '{"prompt_input": "{instruction}{input}{input}", "prompt_no_input": "{instruction}"}',
            "but has input, input, instruction",
        ),
        ("a.json", '{"prompt_input": "{instruction}{input}", "prompt_no_input": "x"}', "but has none"),
        ("a.json", b"\xff", "cannot be used: 'utf-8' codec can't decode"),
        ("chat", None, "has no chat template; give one: --template FILE.jinja"),
        ("a.jinja", b"\xff", "cannot be used: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, tokenizer, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=expected):
        templates.load(str(path) if "." in name else name, tokenizer)


# Chat templates.


@pytest.mark.parametrize(
    ("name", "turns", "record", "expected"),
    [
        (
            "chatml",
            "last",
            conversation("sS", "uU", "aA"),
            [
                "T*<|im_start|>",
                "T system\n",
                "P S",
                "T*<|im_end|>",
                "T \n",
                "T*<|im_start|>",
                "T user\n",
                "N U",
                "T*<|im_end|>",
                "T \n",
                "T*<|im_start|>",
                "T assistant\n",
                "C A",
                "C*<|im_end|>",
                "T \n",
            ],
        ),
        (
            "llama-2",
            "last",
            conversation("s S ", "u U ", "a A ", "u V ", "a B "),
            [
                "T*<s>",
                "T [INST] <<SYS>>\n",
                "P  S ",
                "T \n<</SYS>>\n\n",
                "N  U",
                "T  [/INST] ",
                "P A",
                "T  ",
                "T*</s>",
                "T*<s>",
                "T [INST] ",
                "N V",
                "T  [/INST] ",
                "C B ",
                "C*</s>",
            ],
        ),
        (
            "llama-3",
            "every",
            conversation("uU", "a A\n", "uV", "aB"),
            [
                "T*<s>",
                "T*<|start_header_id|>",
                "T user",
                "T*<|end_header_id|>",
                "T \n\n",
                "N U",
                "T*<|eot_id|>",
                "T*<|start_header_id|>",
                "T assistant",
                "T*<|end_header_id|>",
                "T \n\n",
                "C A",
                "C*<|eot_id|>",
                "T*<|start_header_id|>",
                "T user",
                "T*<|end_header_id|>",
                "T \n\n",
                "N V",
                "T*<|eot_id|>",
                "T*<|start_header_id|>",
                "T assistant",
                "T*<|end_header_id|>",
                "T \n\n",
                "C B",
                "C*<|eot_id|>",
            ],
        ),
        (
            "chatml",
            "last",
            Record("1", "Double it.", "3", "6"),
            [
                "T*<|im_start|>",
                "T user\n",
                "N Double it.",
                "T \n",
                "P 3",
                "T*<|im_end|>",
                "T \n",
                "T*<|im_start|>",
                "T assistant\n",
                "C 6",
                "C*<|im_end|>",
                "T \n",
            ],
        ),
        (
            "llama-2",
            "last",
            Record("1", " Double it.", "3 ", "6"),
            ["T*<s>", "T [INST] ", "N Double it.", "T \n", "P 3", "T  [/INST] ", "C 6 ", "C*</s>"],
        ),
    ],
)
def test_chats_by_hand(name, turns, record, expected):
    assert written(chat(CHATS[name], turns=turns).render(record)) == expected


spelling = st.sampled_from([*SPECIALS, "<s>", "</s>", "[INST]", "[/INST] ", "<<SYS>>\n", "CONTENT0X", "assistant\n"])
content = st.lists(odd | spelling, min_size=1, max_size=3).map("".join)
chats = st.builds(
    lambda system, pairs: conversation(
        *("s" + text for text in system), *(turn for u, a in pairs for turn in ("u" + u, "a" + a))
    ),
    st.lists(content, max_size=1),
    st.lists(st.tuples(content, content), min_size=1, max_size=3),
)


def is_stripped_beyond(record, name):
    """Whether Llama 2's template, which strips system and first user message as one, strips its own marker too."""
    return name == "llama-2" and record.messages[0].role == "system" and not record.messages[1].content.strip()


@pytest.mark.parametrize("turns", ["last", "every"])
@pytest.mark.parametrize("name", CHATS)
@given(record=chats)
def test_a_chat_is_what_transformers_renders_with_every_content_in_its_segment(name, turns, record):
    template = chat(CHATS[name], turns=turns)
    messages = [{"role": message.role, "content": message.content} for message in record.messages]
    expected = BYTE_CHAT.apply_chat_template(messages, chat_template=CHATS[name], tokenize=False)
    try:
        pieces = template.render(record)
    except ValueError:
        assert is_stripped_beyond(record, name)
        return
    assert "".join(piece.text for piece in pieces) == expected
    found = {segment: "" for segment in Segment}
    for piece in pieces:
        found[piece.segment] += "" if piece.is_special else piece.text
    strip = (lambda text: text) if name == "chatml" else str.strip
    if name == "llama-2" and record.messages[0].role == "system":
        return  # which is not stripped, nor is what follows it on its left: above by hand
    segment = [N if m.role == "user" else P for m in record.messages]
    for n, message in enumerate(record.messages):
        if message.role == "assistant" and (turns == "every" or n == len(messages) - 1):
            segment[n] = C
    for mine in (N, P, C):
        after = " " if mine == C and name == "llama-2" else ""
        assert found[mine] == "".join(
            strip(m.content) + after for m, s in zip(record.messages, segment, strict=True) if s == mine
        )


def native(record, tokenizer, source):
    """How transformers itself tokenises a chat, of which it takes every special token's spelling for the token."""
    messages = [{"role": message.role, "content": message.content} for message in record.messages]
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False)


@pytest.mark.parametrize("tokenizer_name", ["bytes", "greedy", "greedy, stripping", "llama", "llama, normalized"])
@pytest.mark.parametrize("name", CHATS)
def test_a_chats_tokens_are_those_of_transformers_unless_it_spells_special_tokens(name, tokenizer_name, request):
    if "llama" in tokenizer_name:
        shared = request.getfixturevalue("shared")
        tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/llama-tokenizer-hf")
        # Normalised special tokens are not found natively after a letter: what counts is what is found of others.
        like = with_specials(AutoTokenizer.from_pretrained(tokenizer.name_or_path), normalized=False)
        tokenizer = with_specials(tokenizer, normalized="normalized" in tokenizer_name)
    elif "greedy" in tokenizer_name:  # special tokens may take white space beside them along, as Phi's do
        is_stripping = "stripping" in tokenizer_name
        tokenizer = like = with_specials(greedy(trim_offsets=True), rstrip=is_stripping, lstrip=is_stripping)
    else:
        tokenizer = like = BYTE_CHAT
    encoder = Encoder(tokenizer, chat(CHATS[name], tokenizer))
    every = chat(CHATS[name], tokenizer, "every")
    specials = [*SPECIALS, "<s>", "</s>"]
    ids = tokenizer.convert_tokens_to_ids(specials)

    @given(record=chats)
    def check(record):
        try:
            (found,) = encoder.encode([record])
        except ValueError:
            assert is_stripped_beyond(record, name)
            return
        tokens = found.tokens.tolist()
        if not any(special in message.content for special in specials for message in record.messages):
            assert tokens == native(record, like, CHATS[name])
        # The special tokens are those of any conversation of so many turns, whatever it spells.
        plain = conversation(*(message.role[0] + "x" for message in record.messages))
        (expected,) = encoder.encode([plain])
        of_plain = expected.tokens.tolist()
        assert (
            [t for t in tokens if t in ids]
            == [t for t in of_plain if t in ids]
            == [t for t in native(plain, like, CHATS[name]) if t in ids]
        )
        assert found.tokens[found.segment == C][-1] in ids  # the model is taught to stop
        # The audit relies on this: the tokens before a special token are the same whatever follows it.
        every.render(record)
        for before, _ in every.prompts(record):
            last = max(number for number, piece in enumerate(before) if piece.is_special)
            whole, part = encoder.prompts([before, before[last:]])
            assert whole[len(whole) - len(part) :].tolist() == part.tolist()
            assert whole[: len(whole) - len(part)].tolist() == tokens[: len(whole) - len(part)]

    check()


@given(record=chats)
def test_separately_tokenised_prompts_end_where_others_do_if_nothing_straddles(record):
    template = chat(CHATML, turns="every")
    by_offsets, separate = (
        Encoder(BYTE_CHAT, template, prompt_border=border).encode([record])[0] for border in ("offsets", "separate")
    )
    assert by_offsets.straddling == separate.straddling == 0
    assert by_offsets.segment.tolist() == separate.segment.tolist()


def test_a_chat_has_no_beginning_but_its_own():
    """The tokenizer's own <s> would be a second one."""
    (found,) = Encoder(BYTE_CHAT, chat(LLAMA_3)).encode([conversation("uU", "aA")])
    assert found.tokens.tolist().count(BOS) == 1


def test_a_chat_that_never_ends_is_ended():
    """A template without special tokens: what follows the last turn is completion, then comes the end of text."""
    source = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n--\n' }}{% endfor %}"
    pieces = chat(source, turns="every").render(conversation("uU", "aA", "uV", "aB"))
    assert written(pieces) == [
        *("T user: ", "N U", "T \n--\nassistant: ", "C A", "T \n--\nuser: ", "N V"),
        *("T \n--\nassistant: ", "C B\n--\n", "C*</s>"),
    ]


def test_an_empty_system_message_is_what_the_template_makes_of_it():
    source = (
        "{% for message in messages %}{% if message['content'] %}{{ message['role'] + message['content'] }}"
        "{% endif %}{% endfor %}"
    )
    assert written(chat(source).render(conversation("s", "uU", "aA")))[:2] == ["T user", "N U"]


def test_an_empty_completion_is_its_end_of_turn():
    pieces = written(chat(CHATML).render(Record("1", "U", "", "")))
    assert pieces[-3:] == ["T assistant\n", "C*<|im_end|>", "T \n"]


def test_newlines_alone_may_be_stripped():
    """As Qwen 3 strips its answers."""
    source = "{% for m in messages %}{{ m['role'] + ':' + m['content'].strip('\\n') + eos_token }}{% endfor %}"
    found = written(chat(source).render(conversation("u\n U \n", "a\n\n A \n")))
    assert found[1] == "N  U "
    assert found[4] == "C  A "


@pytest.mark.parametrize(
    ("source", "record", "expected"),
    [
        (
            LLAMA_2,
            conversation("uU", "uV", "aA"),
            "record chat:1 does not fit the chat template: Roles must alternate.",
        ),
        ("{{ messages[0]['content'] }}", conversation("uU", "aA"), "it leaves out, repeats or reorders messages"),
        (
            "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}",
            conversation("uU", "aA"),
            "it leaves out, repeats or reorders messages",
        ),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            conversation("uu", "aa"),
            "which changes its contents",
        ),
        (
            "{% for m in messages %}{{ m['content'] | replace(' ', '') }}{% endfor %}",
            conversation("uU", "aA"),
            "it changes the space around messages",
        ),
        (
            "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}",
            conversation("uU", "aHm.</think>A"),
            "which changes its contents",
        ),
    ],
)
def test_what_a_chat_template_does_not_keep_whole_is_refused_by_name(source, record, expected):
    with pytest.raises(ValueError, match=expected):
        chat(source).render(record)


KEEPS_LAST_SYSTEM = (
    "{% for m in messages if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endfor %}{{ ns.system }}"
    "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize(
    "source", ["{% set ns = namespace(system='') %}" + KEEPS_LAST_SYSTEM, LLAMA_2, "{{ messages[-1]['content'] }}"]
)
def test_of_two_system_turns_none_is_lost(source):
    record = conversation("sS", "sR", "uU", "aA")
    with pytest.raises(ValueError, match="does not fit the chat template"):
        chat(source).render(record)
    found = written(chat(CHATML).render(record))
    assert [text for text in found if text[:2] in ("P ", "N ")] == ["P S", "P R", "N U"]


@pytest.mark.parametrize("order", [1, -1])
def test_an_answer_that_is_not_trained_on_is_prompt(order):
    """Also right before or after a record of the same roles without such a mark: outlines are kept by shape."""
    plain = conversation("uU", "aA", "uV", "aB")
    user, answer, *rest = plain.messages
    marked = replace(plain, messages=(user, replace(answer, is_trained=False), *rest))
    template = chat(CHATML, turns="every")
    found = {id(record): template.render(record) for record in (plain, marked)[::order]}
    assert written(found[id(marked)]) == written(chat(CHATML, turns="last").render(plain))
    assert found[id(plain)] != found[id(marked)]
    assert written(Piece(*part) for part in contents(marked, "every")) == ["N U", "P A", "N V", "C B"]


def test_no_date_of_today_gets_into_a_chat():
    source = "{{ strftime_now('%d %B %Y, %Y-%m-%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert chat(source).render(conversation("uU", "aA"))[0] == Piece("26 July 2024, 2024-07-26", T)


def test_a_chat_template_comes_from_the_tokenizer_or_a_file(tmp_path):
    tokenizer = with_specials(byte_tokenizer())
    tokenizer.chat_template = CHATML
    (tmp_path / "chatml.jinja").write_text(CHATML)
    record = conversation("uU", "aA", "uV", "aB")
    for turns in ("last", "every"):
        own = templates.load("chat", tokenizer, completion_turns=turns)
        from_file = templates.load(str(tmp_path / "chatml.jinja"), tokenizer, completion_turns=turns)
        assert own.render(record) == from_file.render(record) == chat(CHATML, turns=turns).render(record)
        assert own.digest == from_file.digest


def test_templates_of_different_output_have_different_digests():
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.eos_token = "<s>"
    found = [
        *(templates.load(name, BYTE_CHAT).digest for name in ("alpaca", "none")),
        *(chat(source, turns=turns).digest for source in CHATS.values() for turns in ("last", "every")),
        chat(LLAMA_2, tokenizer).digest,
    ]
    assert len(set(found)) == len(found)


def test_contents_are_the_records_own_texts():
    def found(record, turns):
        return written(Piece(*part) for part in contents(record, turns))

    assert found(Record("1", "I", "X", "O"), "last") == ["N I", "P X", "C O"]
    record = conversation("sS", "uU", "aA", "uV", "aB")
    assert found(record, "last") == ["P S", "N U", "P A", "N V", "C B"]
    assert found(record, "every") == ["P S", "N U", "C A", "N V", "C B"]


def test_the_tokenizers_own_beginning_is_for_texts_that_have_none():
    tokenizer = with_specials(byte_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    (text,) = Encoder(tokenizer, templates.load("none", tokenizer)).encode([Record("1", "U", "", "A")])
    (talk,) = Encoder(tokenizer, chat(CHATML, tokenizer)).encode([Record("1", "U", "", "A")])
    assert (text.tokens.tolist().count(BOS), talk.tokens.tolist().count(BOS)) == (1, 0)


SAID = "{% for message in messages %}{{ message.role + message.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
)
def test_a_template_that_needs_much_memory_is_refused(source):
    with pytest.raises(
        ValueError, match=r"the chat template needs more than \d+ MiB of memory, at record 1; use another"
    ):
        chat(source + SAID).render(Record("1", "a", "", "b"))
    assert written(chat(SAID).render(Record("1", "a", "", "b")))  # the next one is rendered


def test_a_template_that_computes_for_long_is_refused(monkeypatch):
    template, record = chat(SAID), Record("1", "a", "", "b")
    template.render(record)
    monkeypatch.setattr(chat_template, "_RENDERER", bounded.Worker(spin))
    for work in (lambda: chat(SAID).render(record), lambda: list(template.prompts(record))):
        with pytest.raises(ValueError, match=r"the chat template takes more than \d+ seconds to compute, at record 1"):
            work()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'x' * 2_000_000 }}", "it writes more than 1,000,000 characters of its own"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion depth"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "RecursionError: maximum recursion depth"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 10 ** 5000 }}", "Exceeds the limit"),
        ("{% include 'a' %}", "no loader for this environment"),
    ],
)
def test_whatever_a_template_raises_is_told_with_its_kind(source, expected):
    with pytest.raises(Misfit, match=f"record 1 does not fit the chat template: {expected}"):
        chat(source + SAID).render(Record("1", "a", "", "b"))


@pytest.mark.parametrize("name", ["a.json", "a.jinja"])
def test_a_template_is_not_read_beyond_its_longest(tmp_path, tokenizer, name):
    (tmp_path / name).write_text("x" * 1_000_001)
    with pytest.raises(ValueError, match=rf"{name} cannot be used: has more than 1,000,000 characters"):
        templates.load(str(tmp_path / name), tokenizer)
    with pytest.raises(ValueError, match="the chat template has more than 1,000,000 characters"):
        chat("x" * 1_000_001)


def test_a_template_nested_without_end_is_no_template(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a.json cannot be used: maximum recursion"):
        templates.load(str(tmp_path / "a.json"), tokenizer)

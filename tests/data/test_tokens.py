"""Does every token know its segment, and are the tokens those of the text, whatever the record holds?"""

import gzip
import itertools
import json
import warnings

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plw_mlflow import study
from plw_mlflow.data import templates
from plw_mlflow.data.chat_template import ChatTemplate
from plw_mlflow.data.pieces import Segment, prompt_pieces
from plw_mlflow.data.records import Fault, Message, Record
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.toy import TOY_FOLDER
from tests.conftest import BOS, BYTES, EOS, byte_tokenizer

T, N, P, C = Segment.TEMPLATE, Segment.INSTRUCTION, Segment.INPUT, Segment.COMPLETION


def encoder(tokenizer, template="alpaca", prompt_border="offsets"):
    return Encoder(tokenizer, templates.load(template, tokenizer), prompt_border=prompt_border)


def encode(record, tokenizer, *how):
    """Tokens, segments and straddling tokens of one record."""
    (found,) = encoder(tokenizer, *how).encode([record])
    assert (found.tokens.dtype, found.segment.dtype) == (np.int32, np.int8)
    return found.tokens.tolist(), found.segment.tolist(), found.straddling


def test_a_record_by_hand(tmp_path):
    """Words as tokens, in a template short enough to read."""
    forms = {"prompt_input": "Task: {instruction} On: {input} Answer:", "prompt_no_input": "{instruction}"}
    (tmp_path / "short.json").write_text(json.dumps(forms))
    words = ["<s>", "</s>", "Task:", "On:", "Answer:", "add", "up", "2", "3", "five"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokens, segment, _ = encode(Record("by hand", "add up", "2 3", " five"), tokenizer, str(tmp_path / "short.json"))
    assert tokens == [2, 5, 6, 3, 7, 8, 4, 9, 1]
    assert segment == [T, N, N, T, P, P, T, C, C]


odd = st.text(max_size=12) | st.sampled_from(
    [
        "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",  # right to left, and marks that turn the direction
        "\U0001f469\u200d\U0001f469\u200d\U0001f466 e\u0301",  # an emoji of several code points, and a combining accent
        "\x00",
        "\r\n\t\u3000\u2028",
        "\ufeff\ufffd",
        "{instruction} {input} {0} {{ %s }",
        "<s>struck out</s>",  # HTML, and the spelling of special tokens
        "\ufdd0\ufdd1",  # noncharacters, between which the encoder writes numbers
        "\n\n### Response:",
        "\n\n### Input:\n",
    ]
)


def by_byte(record):
    """The bytes of a record in Alpaca's template and the segment of each, from the lengths of its parts."""
    before, after = study.ALPACA_WITHOUT_INPUT.split("{instruction}")
    pieces = [(before, T), (record.instruction, N), (after, T), (record.output, C)]
    if record.input:
        before, after = study.ALPACA_WITH_INPUT.split("{instruction}")
        between, end = after.split("{input}")
        pieces = [(before, T), (record.instruction, N), (between, T), (record.input, P), (end, T), (record.output, C)]
    return "".join(text for text, _ in pieces).encode(), [segment for text, segment in pieces for _ in text.encode()]


def spelled(token):
    """The bytes of a token of a byte-level tokenizer."""
    return bytes(BYTE[character] for character in token)


# GPT-2's printable stand-ins for bytes, from their definition: printable Latin-1, and for the others 256 upwards.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE = {chr(value): value for value in _PRINTABLE}
BYTE |= {chr(256 + n): value for n, value in enumerate(value for value in range(256) if value not in _PRINTABLE)}


@given(instruction=odd, context=odd, output=odd)
@example("{instruction}", "\n\n### Response:4", "### Instruction:\n{input}")
@example("", "", "")
def test_segments_part_the_tokens_in_order_whatever_the_text(instruction, context, output):
    """With a token a byte, segments are known from the lengths of the pieces in bytes."""
    record = Record("1", instruction, context, output)
    tokens, segment, straddling = encode(record, byte_tokenizer(bos=True))
    text, expected = by_byte(record)
    assert segment == [T, *expected, C]
    assert (tokens[0], tokens[-1], straddling) == (BOS, EOS, 0)
    character = {number: character for character, number in BYTES.items()}
    assert spelled(character[token] for token in tokens[1:-1]) == text


def greedy(*, trim_offsets=None):
    """A BPE that merges across everything, template and record alike; perhaps with GPT-2's trimming of offsets."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    texts = [
        study.ALPACA_WITH_INPUT.format(instruction=a + b, input=b + a) + a for a in "0Aa\n" for b in "0 \U0001f469"
    ]
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.ByteLevel()
    if trim_offsets is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


GREEDY = {None: greedy(), True: greedy(trim_offsets=True)}


@pytest.mark.parametrize("trim_offsets", [None, True])
@given(instruction=odd, context=odd, output=odd)
def test_a_token_belongs_where_its_last_character_does(trim_offsets, instruction, context, output):
    """Tokens of many bytes straddle the borders; their own spelling says where each ends."""
    record, tokenizer = Record("1", instruction, context, output), GREEDY[trim_offsets]
    tokens, segment, straddling = encode(record, tokenizer)
    text, expected = by_byte(record)
    pieces = [spelled(piece) for piece in tokenizer.convert_ids_to_tokens(tokens[:-1])]
    assert b"".join(pieces) == text
    ends = list(itertools.accumulate(map(len, pieces)))
    # The last byte may belong to a character that goes on in the next token, but not to another segment.
    assert segment == [*(expected[end - 1] for end in ends), C]
    border = expected.index(C) if output else len(text)
    assert straddling == sum(end - len(piece) < border < end for piece, end in zip(pieces, ends, strict=True))


def tokenizers_with_offsets():
    """Tokenizers whose own offsets can be trusted, by name; those of ../shared are added where they are needed."""
    yield "toy", AutoTokenizer.from_pretrained(TOY_FOLDER)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "Response:": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # gives no token to white space
    yield "words", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    trainer = trainers.UnigramTrainer(special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", vocab_size=60)
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.train_from_iterator([study.ALPACA_WITH_INPUT], trainer)
    yield (
        "unigram",
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    )


WITH_OFFSETS = dict(tokenizers_with_offsets())


@pytest.mark.parametrize("name", [*WITH_OFFSETS, "llama", "stories"])
def test_other_tokenizers_give_what_their_own_offsets_say(name, request):
    """Against every token's offsets, as transformers gives them, for one text after another."""
    folders = {"llama": "llama-tokenizer-hf", "stories": "stories260K-hf"}
    if name in folders:
        shared = request.getfixturevalue("shared")
        tokenizer = AutoTokenizer.from_pretrained(shared / "data/models" / folders[name])
    else:
        tokenizer = WITH_OFFSETS[name]
    encode_all = encoder(tokenizer).encode

    @settings(max_examples=40)
    @given(st.lists(st.tuples(odd, odd, odd), min_size=1, max_size=3))
    @example([("a", "", '"'), ("", " ", "  ")])
    def check(texts):
        # The pieces of a Unigram model hold its special tokens, so natively they are found in any text.
        assume(name != "unigram" or not any("<s>" in part for text in texts for part in text))
        all_found = encode_all([Record(str(n), *text) for n, text in enumerate(texts)])
        for text, found in zip(texts, all_found, strict=True):
            pieces = templates.load("alpaca", tokenizer).render(Record("", *text))
            native = tokenizer(
                "".join(piece.text for piece in pieces), return_offsets_mapping=True, split_special_tokens=True
            )
            assert found.tokens.tolist() == [*native["input_ids"], tokenizer.eos_token_id]
            ends = list(itertools.accumulate(len(piece.text) for piece in pieces))
            segment = [
                next(piece.segment for piece, end in zip(pieces, ends, strict=True) if last <= end)
                for _, last in native["offset_mapping"]
            ]
            assert found.segment.tolist() == [*segment, C]

    check()


def test_a_token_that_straddles_the_end_of_the_prompt_is_completion():
    tokenizer = byte_tokenizer((":", "4"))
    tokens, segment, straddling = encode(Record("1", "Double 2:", "", "42"), tokenizer)
    across, last = tokenizer.convert_tokens_to_ids([":4", "2"])
    assert tokens[-3:] == [across, last, EOS]
    assert segment[-4:] == [T, C, C, C]
    assert straddling == 1


def test_or_prompt_where_the_prompt_is_tokenised_separately():
    tokenizer = byte_tokenizer((":", "4"))
    tokens, segment, straddling = encode(Record("1", "Double 2:", "", "42"), tokenizer, "alpaca", "separate")
    assert tokens[-3:] == [tokenizer.convert_tokens_to_ids(":4"), *tokenizer.convert_tokens_to_ids(["2", "</s>"])]
    assert segment[-4:] == [T, T, C, C]
    assert straddling == 0


@pytest.mark.parametrize("trim_offsets", [None, True])
@given(instruction=odd, context=odd, output=odd)
def test_separately_tokenised_prompts_are_counted_as_the_alpaca_code_counts_them(
    trim_offsets, instruction, context, output
):
    """Its preprocess(): labels are the tokens of prompt and output together, the first len(tokens of prompt) masked."""
    record, tokenizer = Record("1", instruction, context, output), GREEDY[trim_offsets]
    tokens, segment, _ = encode(record, tokenizer, "alpaca", "separate")
    rendered = templates.load("alpaca", tokenizer).render(record)
    prompt = "".join(piece.text for piece in prompt_pieces(rendered))
    source, both = (
        tokenizer(text, split_special_tokens=True)["input_ids"] for text in (prompt, prompt + record.output)
    )
    assert tokens == [*both, tokenizer.eos_token_id]
    masked = min(len(source), len(both))
    assert [s == C for s in segment] == [False] * masked + [True] * (len(tokens) - masked)
    _, by_offsets, straddling = encode(record, tokenizer)
    assert straddling or segment == by_offsets


def test_a_space_that_a_tokenizer_leaves_out_of_its_offsets_counts():
    """The offsets of GPT-2's ": " end with the colon, which would make the completion's space prompt."""
    tokenizer = byte_tokenizer((":", "Ġ"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokens, segment, straddling = encode(Record("1", "Go", "", " x"), tokenizer)
    assert tokens[-3] == tokenizer.convert_tokens_to_ids(":Ġ")
    assert segment[-4:] == [T, C, C, C]
    assert straddling == 1


@pytest.mark.parametrize(
    ("merges", "pieces", "segment"),
    [
        # Whole: a, b, newline-4. Alone: one token, so b is completion.
        ([("Ċ", "4"), ("b", "Ċ"), ("a", "bĊ")], ["a", "b", "Ċ4"], [N, C, C]),
        # Whole: one token. Alone: three, more than there are.
        ([("Ċ", "4"), ("b", "Ċ4"), ("a", "bĊ4")], ["abĊ4"], [T]),
    ],
)
def test_prompts_that_break_otherwise_alone(merges, pieces, segment):
    """In place of each piece's own tokens, the first so many of the whole text are prompt."""
    tokenizer = byte_tokenizer(*merges)
    found = encode(Record("1", "ab", "", "4"), tokenizer, "none", "separate")
    assert found == ([*tokenizer.convert_tokens_to_ids(pieces), EOS], [*segment, C], 0)


def test_a_completion_may_be_lost_to_a_prompt_that_is_longer_alone():
    tokenizer = byte_tokenizer(("Ċ", "4"), ("b", "Ċ4"), ("a", "bĊ4"))
    source = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    template = ChatTemplate(source, tokenizer)
    (found,) = Encoder(tokenizer, template, prompt_border="separate").encode([Record("1", "ab", "", "4")])
    assert found.tokens.tolist() == [*tokenizer.convert_tokens_to_ids(["abĊ4", "Ċ"]), EOS]
    assert found.segment.tolist() == [T, T, T]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", ["alpaca", "none"])
def test_a_text_begins_as_its_tokenizer_has_the_habit_and_ends_once(bos, template):
    tokens, segment, _ = encode(Record("1", "Go.", "", "Gone"), byte_tokenizer(bos=bos), template)
    assert tokens.count(BOS) == bos
    assert (tokens[0] == BOS) == bos
    assert segment[0] == (T if bos or template == "alpaca" else N)
    assert [index for index, token in enumerate(tokens) if token == EOS] == [len(tokens) - 1]
    assert segment[-1] == C


def test_a_tokenizer_that_ends_texts_itself_ends_them_once():
    tokenizer, record = byte_tokenizer(), Record("1", "Go.", "", "Gone")
    expected = encode(record, tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    assert encode(record, tokenizer) == expected


def test_an_empty_completion_is_its_end_of_text():
    tokens, segment, _ = encode(Record("1", "Say nothing.", "", ""), byte_tokenizer())
    assert segment.count(C) == 1
    assert (tokens[-1], segment[-1]) == (EOS, C)


def test_a_record_that_spells_special_tokens_holds_text():
    tokens, segment, _ = encode(Record("1", "Strike <s>it</s>", "", "<s>it</s>"), byte_tokenizer(bos=True))
    assert [token for token in tokens if token in (BOS, EOS)] == [BOS, EOS]
    assert segment.count(C) == len("<s>it</s>") + 1


@pytest.mark.parametrize("name", WITH_OFFSETS)
def test_whatever_the_kind_of_tokenizer(name):
    tokenizer = WITH_OFFSETS[name]
    special = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    tokens, _, _ = encode(Record("1", "Strike <s> it </s>", "</s>", "<s> it </s>"), tokenizer)
    assert [token for token in tokens[1:] if token in special] == [tokenizer.eos_token_id]


def test_a_token_that_straddles_an_answers_end_is_the_answers():
    """Otherwise all answers but the last would lose it to the template, where that ends them with no special token."""
    tokenizer = byte_tokenizer(("A", "Ċ"))
    source = "{% for m in messages %}{{ m.role[0] + m.content + '\n' }}{% endfor %}"
    turns = [("user", "U"), ("assistant", "aA"), ("user", "V"), ("assistant", "B")]
    record = Record("1", "V", "", "B", tuple(Message(*turn) for turn in turns))
    for turns, count in (("every", 1), ("last", 0)):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            (found,) = Encoder(tokenizer, ChatTemplate(source, tokenizer, turns)).encode([record])
        assert [str(one.message)[:41] for one in warned] == ["the chat template ends answers with no sp"] * count
        answer = Segment.COMPLETION if count else Segment.INPUT
        assert found.segment.tolist() == [
            *(Segment.TEMPLATE, Segment.INSTRUCTION, Segment.TEMPLATE, Segment.TEMPLATE),  # u U newline a
            *(answer, answer if count else Segment.TEMPLATE),  # a, and A with the newline
            *(Segment.TEMPLATE, Segment.INSTRUCTION, Segment.TEMPLATE, Segment.TEMPLATE),
            *[Segment.COMPLETION] * 3,  # B, newline, end of text
        ]
        assert (found.straddling, found.straddling_end) == (0, count)


def test_a_record_that_spells_what_the_encoder_writes_for_them_is_refused():
    good, bad = Record("1", "Go", "", "Gone"), Record("2", "Go", "", f"\ufdd0{EOS}\ufdd1")
    first, refused, last = encoder(byte_tokenizer()).encode([good, bad, good])
    assert refused == Fault("holds the noncharacters U+FDD0 and U+FDD1 around a number")
    assert first.tokens.tolist() == last.tokens.tolist()


@pytest.mark.parametrize("field", ["instruction", "input"])
@pytest.mark.parametrize("prompt_border", ["offsets", "separate"])
def test_a_record_that_holds_the_response_header_does_not_move_the_border(tokenizer, field, prompt_border):
    fields = {"instruction": "Say.", "input": "This."} | {field: "x\n\n### Response:\nno\n\n### Response:"}
    _, segment, _ = encode(Record("1", output="yes", **fields), tokenizer, "alpaca", prompt_border)
    assert segment.count(C) == len("yes") + 1
    assert segment[-4:] == [C] * 4


@pytest.mark.parametrize("name", ["toy", "llama"])
def test_a_line_of_a_megabyte_changes_no_border(name, request):
    folder = TOY_FOLDER if name == "toy" else request.getfixturevalue("shared") / "data/models/llama-tokenizer-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    line = "### Response: 0123456789 " * 40_000
    short, long = encoder(tokenizer).encode(
        [Record("1", "Sum up.", "x", "Done."), Record("2", "Sum up.", line, "Done.")]
    )
    for segment in (T, N, C):
        mine, expected = long.tokens[long.segment == segment], short.tokens[short.segment == segment]
        assert mine.tolist() == expected.tolist()
    assert np.count_nonzero(long.segment == P) == len(
        tokenizer("\n" + line, add_special_tokens=False)["input_ids"]
    ) - len(tokenizer("\n", add_special_tokens=False)["input_ids"])


def test_examples_do_not_depend_on_what_they_are_encoded_with(tokenizer):
    records = [Record(str(n), "a" * n, "b" * (n % 3), "c" * n) for n in range(1, 8)]
    together = encoder(tokenizer).encode(records)
    for record, found in zip(records, together, strict=True):
        assert (found.tokens.tolist(), found.segment.tolist(), found.straddling) == encode(record, tokenizer)


def test_nothing_is_encoded_of_nothing(tokenizer):
    assert encoder(tokenizer).encode([]) == encoder(tokenizer).count([]) == []


def test_a_call_before_leaves_no_trace():
    """transformers keeps a call's truncation and padding in the tokenizer."""
    record, used, tokenizer = Record("1", "Go.", "", "Gone"), byte_tokenizer(), byte_tokenizer()
    tokenizer.pad_token = "</s>"
    used.pad_token = "</s>"
    used(["a", "abcdef"], truncation=True, max_length=3, padding="max_length")
    source = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    before, after = (Encoder(each, ChatTemplate(source, each)) for each in (tokenizer, used))
    assert after.digest == before.digest
    assert after.encode([record])[0].tokens.tolist() == before.encode([record])[0].tokens.tolist()
    assert after.count(["abcdef"]) == [6]


@given(st.lists(odd, max_size=4))
def test_bare_counts_leave_out_special_tokens(texts):
    assert encoder(byte_tokenizer(bos=True)).count(texts) == [len(text.encode()) for text in texts]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_border": "separate"},
        {"template": "none"},
        {"tokenizer": byte_tokenizer(bos=True)},
        {"tokenizer": byte_tokenizer(("a", "b"))},
        {"tokenizer": byte_tokenizer(eos="<s>")},
    ],
)
def test_whatever_decides_the_tokens_changes_the_digest(change):
    first = {"tokenizer": byte_tokenizer()}
    assert encoder(**first).digest == encoder(**first).digest
    assert encoder(**first | change).digest != encoder(**first).digest


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (byte_tokenizer(eos=None), "has no end-of-text token"),
        (
            type("OldTokenizer", (), {"is_fast": False, "added_tokens_decoder": {}})(),
            "OldTokenizer is a slow tokenizer",
        ),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(tokenizer, expected):
    with pytest.raises(ValueError, match=expected):
        encoder(tokenizer)


def test_llama_on_alpaca_gives_the_tokens_of_the_whole_text(shared):
    """The study's tokenizer and data, against the tokenizers library alone."""
    folder = shared / "data/models/llama-tokenizer-hf"
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    with gzip.open(shared / "data/instruct/alpaca_data.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)[:2000]
    records = [Record(str(number), **row) for number, row in enumerate(rows)]
    by_offsets, separate = encoder(tokenizer).encode(records), encoder(tokenizer, "alpaca", "separate").encode(records)
    straddled = 0
    for row, found, apart in zip(rows, by_offsets, separate, strict=True):
        template = study.ALPACA_WITH_INPUT if row["input"] else study.ALPACA_WITHOUT_INPUT
        prompt = template.format_map(row)
        alone, whole = plain.encode(prompt).ids, plain.encode(prompt + row["output"]).ids
        assert found.tokens.tolist() == apart.tokens.tolist() == [*whole, tokenizer.eos_token_id]
        assert np.count_nonzero(apart.segment != C) == len(alone)
        # Where a completion begins with a quotation mark, LLaMA has one token for it and the colon before it.
        pairs = zip(alone, whole, strict=False)
        shared_start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        assert np.count_nonzero(found.segment != C) == shared_start
        assert found.straddling == len(alone) - shared_start
        straddled += found.straddling
    assert 0 < straddled < 100  # few, but there

"""Does every token know its segment, and is the text that of the template, whatever the record holds?"""

import gzip
import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plw_mlflow import records, tokens
from plw_mlflow.records import Record
from plw_mlflow.tokens import Segment, encode
from tests.conftest import BOS, BYTES, EOS, byte_tokenizer

T, N, P, C = Segment.TEMPLATE, Segment.INSTRUCTION, Segment.INPUT, Segment.COMPLETION


def test_a_record_by_hand(monkeypatch):
    """Words as tokens, in a template short enough to read."""
    monkeypatch.setattr(tokens, "ALPACA_WITH_INPUT", "Task: {instruction} On: {input} Answer:")
    words = ["<s>", "</s>", "Task:", "On:", "Answer:", "add", "up", "2", "3", "five"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    found = encode(Record("by hand", "add up", "2 3", " five"), tokenizer)
    assert found.tokens == [2, 5, 6, 3, 7, 8, 4, 9, 1]
    assert found.segment == [T, N, N, T, P, P, T, C, C]


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
def test_tokens_decode_to_the_template_to_the_letter(tokenizer, context, expected):
    record = Record("1", "Double it.", context, " 6.\n")
    assert tokens.prompt(record) == expected
    assert tokenizer.decode(encode(record, tokenizer).tokens) == expected + " 6.\n</s>"


odd = st.text(max_size=12) | st.sampled_from(
    [
        "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",  # right to left, and marks that turn the direction
        "\U0001f469\u200d\U0001f469\u200d\U0001f466 e\u0301",  # an emoji of several code points, and a combining accent
        "\x00",
        "\r\n\t\u3000\u2028",
        "\ufeff\ufffd",
        "{instruction} {input} {0} {{ %s }",
        "<s>struck out</s>",  # HTML, and the spelling of special tokens
        "\n\n### Response:",
        "\n\n### Input:\n",
    ]
)


@given(instruction=odd, context=odd, output=odd)
@example("{instruction}", "\n\n### Response:4", "### Instruction:\n{input}")
def test_segments_part_the_tokens_in_order_whatever_the_text(instruction, context, output):
    """With a token a byte, segments are known from the lengths of the pieces in bytes."""
    record = Record("1", instruction, context, output)
    found = encode(record, byte_tokenizer())
    before, after = tokens.ALPACA_WITHOUT_INPUT.split("{instruction}")
    pieces = [(before, T), (instruction, N), (after, T), (output, C)]
    if context:
        before, after = tokens.ALPACA_WITH_INPUT.split("{instruction}")
        between, end = after.split("{input}")
        pieces = [(before, T), (instruction, N), (between, T), (context, P), (end, T), (output, C)]
    expected = [segment for text, segment in pieces for _ in text.encode()]
    assert found.segment == [*expected, C]
    text = "".join(text for text, _ in pieces)
    alphabet = {number: character for character, number in BYTES.items()}
    byte = {character: value for value, character in _bytes_to_characters().items()}
    assert bytes(byte[alphabet[token]] for token in found.tokens[:-1]) == text.encode()


def _bytes_to_characters() -> dict[int, str]:
    """GPT-2's table of printable stand-ins for bytes, from its definition: printable Latin-1, then 256 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + n) for n, value in enumerate(hidden)}


@given(instruction=odd, context=odd, output=odd)
def test_a_token_belongs_where_its_last_character_does(greedy, instruction, context, output):
    """Tokens of many bytes straddle the borders; their own spelling says where each ends."""
    record = Record("1", instruction, context, output)
    found = encode(record, greedy)
    by_byte = [segment for text, segment in tokens.render(record) for _ in text.encode()]
    lengths = [len(greedy.convert_ids_to_tokens(token)) for token in found.tokens[:-1]]
    ends = itertools.accumulate(lengths)
    # The last byte may belong to a character that goes on in the next token, but not to another segment.
    assert found.segment == [*(by_byte[end - 1] for end in ends), C]


@pytest.fixture(scope="module")
def greedy():
    """A BPE that merges across everything, template and record alike."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet)
    texts = [
        tokens.ALPACA_WITH_INPUT.format(instruction=a + b, input=b + a) + a for a in "0Aa\n" for b in "0 \U0001f469"
    ]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_a_token_that_straddles_the_end_of_the_prompt_is_completion():
    tokenizer = byte_tokenizer((":", "4"))
    found = encode(Record("1", "Double 2:", "", "42"), tokenizer)
    straddling, last = tokenizer.convert_tokens_to_ids([":4", "2"])
    assert found.tokens[-3:] == [straddling, last, EOS]
    assert found.segment[-4:] == [T, C, C, C]


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_begins_as_its_tokenizer_has_the_habit_and_ends_once(bos):
    found = encode(Record("1", "Go.", "", "Gone"), byte_tokenizer(bos=bos))
    assert (found.tokens[0] == BOS) == bos
    assert found.tokens.count(BOS) == bos
    assert found.segment[0] == T
    assert [index for index, token in enumerate(found.tokens) if token == EOS] == [len(found.tokens) - 1]
    assert found.segment[-1] == C


def test_a_tokenizer_that_ends_texts_itself_ends_them_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    found = encode(Record("1", "Go.", "", "Gone"), tokenizer)
    assert found == encode(Record("1", "Go.", "", "Gone"), byte_tokenizer())


def test_a_record_that_spells_special_tokens_holds_text():
    found = encode(Record("1", "Strike <s>it</s>", "", "<s>it</s>"), byte_tokenizer(bos=True))
    assert [token for token in found.tokens if token in (BOS, EOS)] == [BOS, EOS]
    assert found.segment.count(C) == len("<s>it</s>") + 1


@pytest.mark.parametrize("field", ["instruction", "input"])
def test_a_record_that_holds_the_response_header_does_not_move_the_border(tokenizer, field):
    fields = {"instruction": "Say.", "input": "This."} | {field: "x\n\n### Response:\nno\n\n### Response:"}
    found = encode(Record("1", output="yes", **fields), tokenizer)
    assert found.segment.count(C) == len("yes") + 1
    assert found.segment[-4:] == [C] * 4


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (byte_tokenizer(eos=None), "has no end-of-text token"),
        (type("OldTokenizer", (), {"is_fast": False})(), "OldTokenizer is a slow tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(tokenizer, expected):
    with pytest.raises(ValueError, match=expected):
        encode(Record("1", "Go.", "", "Gone"), tokenizer)


def test_llama_counts_on_alpaca_are_those_of_the_texts_alone(shared):
    """The study's tokenizer and data: prompt and completion by tokenising the prompt alone, and then the whole."""
    folder = shared / "data/models/llama-tokenizer-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with gzip.open(shared / "data/instruct/alpaca_data.json.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in json.load(file) if row["output"].strip()][:2000]
    source = records.load(str(shared / "data/instruct/alpaca_data.json.gz"), max_records=2000, on_bad_record="skip")
    straddled = 0
    for row, record in zip(rows, source.records, strict=True):
        template = tokens.ALPACA_WITH_INPUT if row["input"] else tokens.ALPACA_WITHOUT_INPUT
        prompt = template.format_map(row)
        alone, whole = plain.encode(prompt).ids, plain.encode(prompt + row["output"]).ids
        # Where a completion begins with a quotation mark, LLaMA has one token for it and the colon before it.
        pairs = zip(alone, whole, strict=False)
        shared_start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        straddled += shared_start < len(alone)
        found = encode(record, tokenizer)
        assert found.tokens == [*whole, tokenizer.eos_token_id]
        assert found.segment.count(C) == len(found.tokens) - shared_start, record.id
    assert 0 < straddled < 100  # few, but there

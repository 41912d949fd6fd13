"""Does scoring see what training saw: the same tokens before an answer, the same border, the same end?"""

import copy
import itertools
import json

import pytest
import torch
from hypothesis import assume, example, given
from tokenizers import processors
from transformers import AutoTokenizer

from plw_mlflow import cell
from plw_mlflow.data import templates
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.records import Record
from plw_mlflow.data.tokens import Encoder, answer_ends
from plw_mlflow.evaluation import measures, prompting
from plw_mlflow.evaluation.caching_lm import CachingLM
from plw_mlflow.evaluation.endpoint import Endpoint
from plw_mlflow.evaluation.prompting import TemplatedPrompt
from plw_mlflow.evaluation.scorer import Scorer
from plw_mlflow.models import export
from tests.conftest import BOS, EOS, byte_tokenizer, make_example, tiny_llama
from tests.data.test_templates import CHATS, with_specials
from tests.data.test_tokens import WITH_OFFSETS, greedy, odd
from tests.evaluation.test_endpoint import serving
from tests.evaluation.test_scorer import instances, make_model

# Templates that end with white space before an answer, that write no special token, that close a chat by one.
OTHERS = {
    "ends in a newline": {"prompt_input": "{instruction}\n{input}\n\n", "prompt_no_input": "Q: {instruction}\nA:\n"},
    "ends in a blank": {"prompt_input": "{instruction} ({input}) ", "prompt_no_input": "{instruction} = "},
}
NEVER_ENDS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
TEMPLATES = ["alpaca", "none", *OTHERS, *CHATS, "never ends"]


def closing(tokenizer, single):
    """The tokenizer with tokens that it adds around a text."""
    post = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


TOKENIZERS = {
    "bytes": with_specials(byte_tokenizer()),
    "bytes, beginning": with_specials(byte_tokenizer(bos=True)),
    "bytes, ended": with_specials(closing(byte_tokenizer(), "$A </s>")),
    "bytes, beginning and ended": with_specials(closing(byte_tokenizer(), "<s> $A </s>")),
    "greedy": with_specials(greedy()),
    "greedy, specials that strip": with_specials(greedy(), lstrip=True, rstrip=True),
    **{name: with_specials(copy.deepcopy(tokenizer)) for name, tokenizer in WITH_OFFSETS.items()},
}


class Tokenising(CachingLM):
    """A language model of the harness that can tokenise, and nothing else."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    prefix_token_id = eot_token_id
    _loglikelihood_tokens = None


def source(name, folder):
    """What `--template` is to be for a template of this name."""
    if name in OTHERS:
        path = folder / "places.json"
        path.write_text(json.dumps(OTHERS[name]))
    elif name in CHATS or name == "never ends":
        path = folder / "chat.jinja"
        path.write_text(CHATS.get(name, NEVER_ENDS))
    else:
        return name
    return str(path)


def check_tokens_are_equal(question, answer, tokenizer, template, prompt_border):
    """The tokens of a record's prompt and completion in training against those that are scored."""
    record, loaded = Record("1", question, "", answer), templates.load(template, tokenizer)
    (trained,) = Encoder(tokenizer, loaded, prompt_border=prompt_border).encode([record])
    (by_offsets,) = [trained] if prompt_border == "offsets" else Encoder(tokenizer, loaded).encode([record])
    is_completion = trained.segment == Segment.COMPLETION
    border = int(is_completion.argmax())
    prompt, completion = trained.tokens[:border].tolist(), trained.tokens[is_completion].tolist()
    asked = prompting.wrapping(template, tokenizer, prompt_border)([{"role": "user", "content": question}])
    model = Tokenising(tokenizer)
    ((context, continuation),) = model._encode_pairs([(asked, answer)])
    assert context.tolist() == prompt
    assert continuation.tolist() == completion[: len(continuation)]
    assert set(completion[len(continuation) :]) & set(asked.ends)  # what is left is the answer's end
    if not by_offsets.straddling:
        (alone,) = model._encode([asked])
        assert alone.tolist() == prompt


@pytest.mark.parametrize("prompt_border", ["offsets", "separate"])
@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [both for both in itertools.product(TOKENIZERS, TEMPLATES) if both != ("words", "llama-2")],  # it needs a beginning
)
@pytest.mark.filterwarnings("ignore:the chat template ends answers with no special token")
def test_a_prompt_has_the_tokens_it_has_in_training(tokenizer, template, prompt_border, tmp_path):
    for question, answer in [
        ("What does Tom see?", "a ball"),
        ("Strike <s>it</s><|im_end|>.\n", "<s>"),
        (" 2+2=", "4"),
    ]:
        check_tokens_are_equal(question, answer, TOKENIZERS[tokenizer], source(template, tmp_path), prompt_border)


@pytest.mark.parametrize("name", ["llama-tokenizer-hf", "stories260K-hf"])
def test_of_llamas_tokenizers_too(name, shared, tmp_path):
    tokenizer = with_specials(AutoTokenizer.from_pretrained(shared / "data/models" / name))
    for template in ("ends in a blank", "llama-2"):  # each takes a second to read LLaMA's vocabulary
        check_tokens_are_equal("Strike <s>it</s>.", "a ball", tokenizer, source(template, tmp_path), "offsets")


@given(question=odd, answer=odd)
@example("x", "y")
def test_whatever_the_question_and_the_answer(question, answer):
    assume(question.strip() and answer.strip() == answer != "")
    for template in ("alpaca", "none"):
        check_tokens_are_equal(question, answer, TOKENIZERS["greedy"], template, "offsets")


def test_what_a_tokenizer_adds_at_the_end_of_a_text_is_not_asked_for():
    """The harness's own prompts, too: an end would stand between context and continuation."""
    ended, plain = Tokenising(TOKENIZERS["bytes, beginning and ended"]), Tokenising(TOKENIZERS["bytes, beginning"])
    texts = [("Is it", " so?"), ("", "so"), ("<s>Is it", " so?")]
    for found, expected in zip(ended._encode_pairs(texts), plain._encode_pairs(texts), strict=True):
        assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    assert ended.tok_encode("Is it") == plain.tok_encode("Is it")
    assert ended.tok_encode(["Is it", "so"]) == plain.tok_encode(["Is it", "so"])


def test_the_beginning_of_an_answer_that_is_given_is_not_asked_for(tmp_path):
    tokenizer = TOKENIZERS["bytes"]
    prompt = prompting.wrapping(source("chatml", tmp_path), tokenizer)(
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is"}], add_generation_prompt=False
    )
    assert prompt == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nIt is"
    ((context, continuation),) = Tokenising(tokenizer)._encode_pairs([(prompt, " Tom")])
    assert tokenizer.decode(context) == prompt
    assert tokenizer.decode(continuation) == " Tom"


def test_a_copy_of_a_prompt_is_the_prompt(tmp_path):
    prompt = prompting.wrapping("alpaca", TOKENIZERS["bytes"])([{"role": "user", "content": "Who?"}])
    again = copy.copy(prompt)
    assert (again, again.pieces, again.ends) == (prompt, prompt.pieces, (EOS,))


def test_a_prompt_that_a_task_has_changed_is_refused():
    tokenizer = TOKENIZERS["bytes"]
    model = Tokenising(tokenizer)
    model.apply_chat_template = prompting.wrapping("alpaca", tokenizer)
    changed = "Note: " + model.apply_chat_template([{"role": "user", "content": "Who?"}])
    assert not isinstance(changed, TemplatedPrompt)
    for kind, arguments in (("loglikelihood", (changed, "Tom")), ("generate_until", (changed, {"until": ["\n"]}))):
        with pytest.raises(ValueError, match="task odd changes its prompts after the template"):
            getattr(model, kind)(instances(kind, arguments, task="odd"))


def test_a_prompt_that_the_template_cannot_hold_is_refused():
    wrapping = prompting.wrapping("alpaca", TOKENIZERS["bytes"])
    with pytest.raises(ValueError, match="a prompt of the harness holds the noncharacters"):
        wrapping([{"role": "user", "content": f"\ufdd0{EOS}\ufdd1"}])
    ((context, continuation),) = Tokenising(TOKENIZERS["bytes"])._encode_pairs(
        [(wrapping([{"role": "user", "content": "Who?"}]), "\ufdd0")]
    )
    assert len(continuation) == 3
    assert len(context) > 3


# Ends.


def test_answers_end_by_the_special_token_that_the_template_writes_after_them(tmp_path):
    tokenizer = TOKENIZERS["bytes"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name, expected in (("chatml", [end]), ("llama-2", [EOS]), ("alpaca", [EOS])):
        encoder = Encoder(tokenizer, templates.load(source(name, tmp_path), tokenizer))
        examples = encoder.encode([Record("1", "Who?", "", "Tom")])
        assert answer_ends(examples, tokenizer) == expected
        assert answer_ends(examples, tokenizer, len(examples[0].tokens)) == []  # it may have been cut there


def test_a_text_that_ends_a_truncated_example_is_no_end():
    example_of_text = make_example([5, 6, 7], [Segment.TEMPLATE, Segment.COMPLETION, Segment.COMPLETION])
    assert answer_ends([example_of_text], TOKENIZERS["bytes"]) == []


def ended_prompts(tokenizer, answer, folder):
    """A prompt in a template whose answers end by nothing, and by the third token of what a model answers to it."""
    tokenizer.chat_template = CHATS["chatml"]
    prompt = prompting.wrapping("chat", tokenizer)([{"role": "user", "content": "Who sees?"}])
    bare = TemplatedPrompt(prompt.pieces, prompt.encoder, [])
    third = tokenizer(answer(bare), add_special_tokens=False).input_ids[2]
    return bare, TemplatedPrompt(prompt.pieces, prompt.encoder, [third]), third


SETTINGS = {
    "greedy": {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False},
    "drawn, from one": {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": True, "top_k": 1, "temperature": 1.0},
}


def ascii_model(family):
    """A model that writes letters, and so no half of a character and no special token."""
    model = make_model(family, vocab_size=len(TOKENIZERS["bytes"]))
    letters = TOKENIZERS["bytes"].convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"])
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[[number for number in range(len(head)) if number not in letters]] = 0
    return model


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "bloom"])  # the second is answered by the harness's own code
@pytest.mark.filterwarnings("ignore:bloom does not compute the same")
def test_a_scored_generation_ends_where_the_templates_answers_end(family, how, tmp_path):
    model, tokenizer = ascii_model(family), with_specials(byte_tokenizer())
    before = model.generation_config.to_dict()
    scorer = Scorer(model, tokenizer)

    def answer(prompt):
        return scorer.generate_until(instances("generate_until", (prompt, SETTINGS[how])), disable_tqdm=True)[0]

    bare, ended, third = ended_prompts(tokenizer, answer, tmp_path)
    assert len(answer(bare)) > 3
    assert answer(ended) == answer(bare)[: answer(bare).index(tokenizer.decode(third)) + 1]
    assert model.generation_config.to_dict() == before


def test_so_does_one_of_a_model_behind_a_server(tmp_path):
    model, tokenizer = ascii_model("llama"), with_specials(byte_tokenizer())
    tokenizer.save_pretrained(tmp_path)
    with serving(model, tokenizer) as server:
        endpoint = Endpoint(server.address, "served", str(tmp_path))

        def answer(prompt):
            requests = instances("generate_until", (prompt, SETTINGS["greedy"]))
            return endpoint.generate_until(requests, disable_tqdm=True)[0]

        bare, ended, third = ended_prompts(tokenizer, answer, tmp_path)
        assert server.prompts[0] == Tokenising(tokenizer)._encode([bare])[0].tolist()
        assert len(answer(bare)) > 3
        assert answer(ended) == answer(bare)[: answer(bare).index(tokenizer.decode(third))]


def test_a_measured_answer_ends_as_the_examples_do(tmp_path):
    model, tokenizer = ascii_model("llama"), with_specials(byte_tokenizer())
    encoder = Encoder(tokenizer, templates.load(source("chatml", tmp_path), tokenizer))
    examples = encoder.encode([Record("1", "Who?", "", "Tom"), Record("2", "What does he see?", "", "a ball")])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # the end is now what the model writes in place of the letter it writes second
        (written, _), _ = measures.generate(model, tokenizer, examples, 80)
        head = model.get_output_embeddings().weight
        head[end] = head[written[1]] * 1.01
    (shorter, has_ended), _ = measures.generate(model, tokenizer, examples, 80)
    assert (shorter, has_ended) == (written[: written.index(written[1])], True)


def test_an_export_knows_the_end(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    cell.end_generation(model, [EOS])
    assert model.generation_config.eos_token_id == EOS  # as it was
    cell.end_generation(model, [7])
    (tmp_path / "none").mkdir()
    export.write(model, tokenizer, tmp_path / "none", tmp_path)
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"] == [EOS, 7]

"""The demo model that the package carries, and the stories it was trained on."""

import base64
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import gptedge_models
import pytest
import tiktoken
import torch
from gptedge_models.gpt import GPTConfig, GPTModel, generate_text_simple
from gptedge_models.stories import POOLS, read_story, stories, stories_with_slots
from gptedge_models.train_demo import (
    BATCH_SIZE,
    HELD_OUT_SEED,
    N_BPE_STORIES,
    N_HELD_OUT,
    N_STORIES,
    PROMPT,
    RECALL_WEIGHT,
    TRAIN_SEED,
    batches,
    held_out_loss,
    make_encoding,
    recall_accuracy,
    train,
    train_bpe,
)
from safetensors.torch import load_file

DEMO = Path(gptedge_models.__file__).parent / "demo"
UNSEEN_SEED = 2026  # neither trained on nor used for the figures of the model card


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    rows = [row.split() for row in (DEMO / "tokenizer.tiktoken").read_text().splitlines()]
    return {base64.b64decode(token): int(rank) for token, rank in rows}


@pytest.fixture(scope="module")
def encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return make_encoding(ranks)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    model = GPTModel(GPTConfig.from_dict(json.loads((DEMO / "config.json").read_text())))
    missing, unexpected = model.load_state_dict(load_file(DEMO / "model.safetensors"), strict=False)
    assert all(name.endswith("att.mask") for name in missing)
    assert unexpected == []
    return model.eval()


def test_recalls_at_least_95_percent_on_unseen_stories(model: GPTModel, encoding: tiktoken.Encoding) -> None:
    assert recall_accuracy(model, encoding.encode_ordinary, UNSEEN_SEED, 200) >= 0.95


def test_an_untrained_model_recalls_nothing(model: GPTModel, encoding: tiktoken.Encoding) -> None:
    torch.manual_seed(0)
    assert recall_accuracy(GPTModel(model.config).eval(), encoding.encode_ordinary, UNSEEN_SEED, 20) < 0.01


def test_the_card_tells_the_figures_of_these_weights(model: GPTModel, encoding: tiktoken.Encoding) -> None:
    card = (DEMO / "README.md").read_text()
    loss, recall = re.findall(r"\| ([\d.]+)%? \|$", card, re.MULTILINE)
    encode = encoding.encode_ordinary
    # the card rounds to 3 digits; another CPU may turn a near tie of one slot in some 4,700
    assert held_out_loss(model, encode, HELD_OUT_SEED, N_HELD_OUT) == pytest.approx(float(loss), abs=1e-3)
    assert 100 * recall_accuracy(model, encode, HELD_OUT_SEED, N_HELD_OUT) == pytest.approx(float(recall), abs=0.1)


@pytest.mark.parametrize("prompt", [PROMPT, "One morning, Mia"])
def test_greedy_story_is_whole_and_consistent(model: GPTModel, encoding: tiktoken.Encoding, prompt: str) -> None:
    ids = torch.tensor([encoding.encode_ordinary(prompt)])
    told = generate_text_simple(model, ids, 256 - ids.shape[1], 256)[0].tolist()
    assert encoding.eot_token in told
    assert read_story(encoding.decode(told[: told.index(encoding.eot_token)]))


def test_three_steps_of_training_twice_give_the_same_weights(encoding: tiktoken.Encoding) -> None:
    config = GPTConfig(vocab_size=1280, context_length=256, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)
    first, second, longer = (train(config, encoding, n * BATCH_SIZE).state_dict() for n in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], longer["tok_emb.weight"])


def test_training_reads_each_story_to_its_end_and_weighs_what_it_recalls(encoding: tiktoken.Encoding) -> None:
    ids, weights = next(batches(encoding, BATCH_SIZE))
    for row, weight, (story, slots) in zip(ids, weights, stories_with_slots(TRAIN_SEED, BATCH_SIZE), strict=True):
        length = len(encoding.encode_ordinary(story))
        assert encoding.decode(row[:length].tolist()) == story
        assert row[length:].tolist() == [encoding.eot_token] * (len(row) - length)
        assert weight[length:].tolist() == [1.0] + [0.0] * (len(row) - length - 1)
        recalled = encoding.decode(row[weight == RECALL_WEIGHT].tolist())
        assert recalled.split() == " ".join(story[start:end] for start, end in slots).split()


def test_no_unseen_story_was_trained_on() -> None:
    trained = {hash(story) for story in stories(TRAIN_SEED, N_STORIES)}
    unseen = {hash(story) for seed in (HELD_OUT_SEED, UNSEEN_SEED) for story in stories(seed, N_HELD_OUT)}
    assert not trained & unseen


def test_shipped_vocabulary_is_the_one_that_the_command_learns(ranks: dict[bytes, int], model: GPTModel) -> None:
    assert train_bpe(stories(TRAIN_SEED, N_BPE_STORIES), model.config.vocab_size - 1) == ranks


def test_shipped_ranks_count_from_zero_and_begin_with_the_single_bytes(ranks: dict[bytes, int]) -> None:
    assert list(ranks.values()) == list(range(len(ranks)))
    assert list(ranks)[:256] == [bytes([byte]) for byte in range(256)]


def test_byte_pairs_of_the_textbook_example() -> None:
    # the example of the encyclopedias, aaabdaaabac: first aa, at last aaab
    learned = list(train_bpe(iter(["aaabdaaabac"]), 259))[256:]
    assert learned[0] == b"aa"
    assert learned[2] == b"aaab"


def test_any_text_survives_the_vocabulary(encoding: tiktoken.Encoding) -> None:
    text = "Mia's 3 ca\u00f1ons\n\n\t\u4f60\u597d \U0001f98a  <|endoftext|>"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_stories_fit_the_context_with_room(encoding: tiktoken.Encoding, model: GPTModel) -> None:
    longest = max(len(encoding.encode_ordinary(story)) for story in stories(UNSEEN_SEED, 1000))
    assert longest <= 0.75 * model.config.context_length


def test_equal_seeds_tell_equal_stories_and_other_seeds_others() -> None:
    assert list(stories(5, 50)) == list(stories(5, 50))
    assert not set(stories(5, 50)) & set(stories(6, 50))


def test_a_story_is_read_back_and_a_wrong_recall_is_noticed() -> None:
    values = {value for pool in POOLS.values() for value in pool}
    for story, slots in stories_with_slots(UNSEEN_SEED, 100):
        cast = read_story(story)
        assert cast
        for start, end in slots:
            assert story[start:end] in cast.values()
            other = "Zelda" if story[start:end] not in values else "lantern"
            assert read_story(story[:start] + other + story[end:]) is None


def test_a_story_in_which_two_people_share_a_name_is_noticed() -> None:
    for story in stories(UNSEEN_SEED, 100):
        cast = read_story(story)
        assert cast
        assert read_story(re.sub(rf"\b{cast['friend']}\b", cast["hero"], story)) is None


def test_the_text_before_a_recall_slot_determines_it() -> None:
    # where each name, object ... stands for its part, equal pasts go on with the same part
    goes_on: dict[int, set[str]] = defaultdict(set)
    recalled: Counter[int] = Counter()
    for story, slots in stories_with_slots(UNSEEN_SEED, 3000):
        past = 0
        for start, end, part in _masked(story):
            goes_on[past].add(part)
            recalled[past] += (start, end) in slots
            past = hash((past, part))
    assert max(recalled.values()) > 10
    assert all(len(goes_on[past]) == 1 for past, times in recalled.items() if times)


def _masked(story: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, text) of the words and signs of a story, where a value reads as the name of its slot."""
    cast = {value: f"<{slot}>" for slot, value in (read_story(story) or {}).items()}
    for found in re.finditer(rf"\b(?:{'|'.join(map(re.escape, cast))})\b|\w+|\W", story):
        yield found.start(), found.end(), cast.get(found[0], found[0])

import queue
import threading

import numpy as np
import pytest
import torch

import tclora
from tclora.model.tokens import encode
from tclora.route import Routing
from tclora.serve.batch import RowSampling, _RowAnswer
from tclora.serve.engine import Engine
from tclora.serve.request import Request
from tests.route.conftest import *  # noqa: F403
from tests.route.conftest import FAR, PROMPTS

ALL = [*(prompts[1] for prompts in PROMPTS.values()), FAR]


@pytest.fixture
def model(library):
    return tclora.load(library, dtype="float32")


@pytest.fixture
def engine(model):
    engine = Engine(model, max_batch=8)
    yield engine
    engine.close()


class Client:
    """Collects the pieces of one request."""

    def __init__(self, model, prompt, **options):
        (row,) = encode(model.tokenizer, [prompt], [""], template="plain")
        routing = model.route([prompt])
        self.pieces = []
        self.done = threading.Event()
        self.request = Request(tokens=row.prompt, routing=routing, on_piece=self.take, **options)

    def take(self, piece):
        self.pieces.append(piece)
        if piece.finish or piece.error:
            self.done.set()

    def answer(self):
        assert self.done.wait(60)
        return "".join(piece.text for piece in self.pieces)


def asked(engine, prompts, **options):
    clients = [Client(engine.model, prompt, **options) for prompt in prompts]
    for client in clients:
        engine.submit(client.request)
    return clients


def test_requests_that_wait_together_get_what_each_gets_alone(engine, model):
    wanted = [model.generate([prompt], max_new_tokens=8)[0] for prompt in ALL]
    clients = asked(engine, ALL, max_tokens=8)
    assert [client.answer() for client in clients] == [answer.text for answer in wanted]
    for client, answer in zip(clients, wanted, strict=True):
        assert client.pieces[-1].tokens == len(answer.tokens)


def test_tokens_route_themselves_in_a_batch_too(library):
    by_token = tclora.load(library, dtype="float32", router="per-token")
    wanted = [by_token.generate([prompt], max_new_tokens=8)[0] for prompt in ALL]
    engine = Engine(by_token, max_batch=8)
    found = [client.answer() for client in asked(engine, ALL, max_tokens=8)]
    engine.close()
    assert found == [answer.text for answer in wanted]


def test_defaults_of_the_checkpoint_change_no_answer(library, tiny_model, engine):
    wanted = [client.answer() for client in asked(engine, ALL, max_tokens=8)]
    tiny_model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1)
    other = Engine(tclora.load(library, tiny_model))
    assert [client.answer() for client in asked(other, ALL, max_tokens=8)] == wanted
    other.close()


def test_rows_of_a_batch_have_lengths_of_their_own(engine):
    clients = [*asked(engine, ALL[:1], max_tokens=2), *asked(engine, ALL[1:2], max_tokens=7)]
    for client in clients:
        client.answer()
    assert [c.pieces[-1].tokens for c in clients] == [2, 7]
    assert [c.pieces[-1].finish for c in clients] == ["length", "length"]


def test_text_comes_in_pieces(engine):
    (client,) = asked(engine, ALL[:1], max_tokens=12)
    assert client.answer()
    assert len(client.pieces) > 2


def test_half_a_character_is_held_back(model, tokenizer):
    client = Client(model, ALL[0], max_tokens=99)
    answer = _RowAnswer(client.request, tokenizer, model.end_tokens)
    for token in tokenizer("né €5").input_ids:  # one byte is one token
        answer.add(token)
    answer.add(tokenizer.eos_token_id)
    assert [piece.text for piece in client.pieces] == ["n", "é", " ", "€", "5", ""]


def test_an_answer_ends_before_a_stop_string_that_comes_in_parts(engine, model):
    whole = model.generate(ALL[:1], max_new_tokens=12)[0].text
    stop = whole[4:7]
    (client,) = asked(engine, ALL[:1], max_tokens=12, stop=(stop,))
    assert client.answer() == whole[: whole.index(stop)]
    assert client.pieces[-1].finish == "stop"


def test_an_answer_ends_at_any_end_token_of_the_model(engine, model):
    whole = model.generate(ALL[:1], max_new_tokens=8)[0].tokens
    model.model.generation_config.eos_token_id = [model.tokenizer.eos_token_id, whole[3]]
    (client,) = asked(engine, ALL[:1], max_tokens=8)
    client.answer()
    assert client.pieces[-1].finish == "stop"
    assert client.pieces[-1].tokens == whole.index(whole[3]) + 1


def test_a_client_that_cannot_be_reached_does_not_stop_the_others(engine):
    def gone(_):
        raise RuntimeError("Event loop is closed")

    lost = Client(engine.model, ALL[0], max_tokens=3)
    object.__setattr__(lost.request, "on_piece", gone)
    engine.submit(lost.request)
    (client,) = asked(engine, ALL[1:2], max_tokens=3)
    assert client.answer() is not None
    assert engine.alive


def test_a_closed_engine_takes_nothing(model):
    engine = Engine(model)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(Client(model, ALL[0]).request)
    engine.close()


def test_a_cancelled_request_ends_early(engine):
    (client,) = asked(engine, ALL[:1], max_tokens=400)
    client.request.cancelled.set()
    client.answer()
    assert client.pieces[-1].finish == "cancelled"
    assert client.pieces[-1].tokens < 400


def test_a_failing_batch_is_reported_and_the_next_is_served(engine, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "generate", lambda **_: 1 / 0)
        (client,) = asked(engine, ALL[:1])
        assert client.done.wait(30)
        assert isinstance(client.pieces[-1].error, ZeroDivisionError)
    (client,) = asked(engine, ALL[:1], max_tokens=3)
    assert client.answer() is not None
    assert client.pieces[-1].finish


def test_more_requests_than_may_wait_are_refused(model):
    engine = Engine(model, max_batch=1, max_waiting=1)
    held = threading.Event()
    first = Client(model, ALL[0], max_tokens=2)
    object.__setattr__(first.request, "on_piece", lambda _: held.wait(60))
    engine.submit(first.request)
    others = [Client(model, ALL[0], max_tokens=2).request for _ in range(3)]
    refused = 0
    for request in others:
        try:
            engine.submit(request)
        except queue.Full:
            refused += 1
    assert refused >= 1
    held.set()
    engine.close()
    assert not engine.alive


def test_each_row_is_sampled_at_its_own_temperature_and_nucleus():
    def request(temperature, top_p=1.0):
        return Request((1,), routing, print, temperature=temperature, top_p=top_p)

    routing = Routing(np.ones((1, 1), np.float32), np.array([True]), np.ones(1, np.float32))
    scores = torch.tensor([[0.0, 2.0, 1.0, -5.0]]).repeat(4, 1)
    batch = [request(0), request(1), request(0.5), request(1, 0.8)]
    odds = RowSampling(batch)(torch.zeros(4, 1), scores).softmax(1)
    assert odds[0].tolist() == [0, 1, 0, 0]
    assert torch.allclose(odds[1], scores[0].softmax(0))
    assert torch.allclose(odds[2], (scores[0] / 0.5).softmax(0))
    # 0.66 + 0.24 are the smallest set above 0.8.
    assert odds[3].tolist() == pytest.approx([0, 0.7311, 0.2689, 0], abs=1e-4)

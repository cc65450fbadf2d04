"""The page is served, its endpoint answers as the library does, and a browser can use it."""

import base64
import dataclasses
import http.client
import json
import re
import socket
import struct
import threading

import jax
import numpy as np
import pytest

from experiments import playground
from experiments.runs import RunError
from maml_jax.portable import LearnerConfig, build_learner, load_learner, save_learner
from maml_jax.tasks import drawings

pytest.importorskip("PIL.Image", reason="install Pillow with `pip install pillow`")

CONFIGS = {
    "maml": LearnerConfig(
        algorithm="maml",
        hyperparameters={"inner_lr": 0.5, "num_inner_steps": 1},
        way=5,
        inner_steps=1,
        features=4,
        made_by="a test",
    ),
    "protonets": LearnerConfig(algorithm="protonets", way=20, features=4, norm="population"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of untrained learners by name."""
    directory = tmp_path_factory.mktemp("learners")
    for name, config in CONFIGS.items():
        images = np.random.default_rng(0).random((5, 28, 28, 1)).astype(np.float32)
        params = jax.jit(build_learner(config).init)(jax.random.key(0), images)
        save_learner(directory / f"{name}.npz", params, config)
    return {name: directory / f"{name}.npz" for name in CONFIGS}


@pytest.fixture(scope="module")
def server(files):
    with playground.Server(playground.Config(**files, port=0)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def drawing(seed):
    """Pixels with ink at random places."""
    pixels = np.zeros((105, 105), np.uint8)
    for row, column in np.random.default_rng(seed).integers(10, 90, (6, 2)):
        pixels[row : row + 12, column : column + 4] = 200
    pixels[50, 50] = 255
    return pixels


def encode(pixels):
    return base64.b64encode(pixels.tobytes()).decode()


REQUEST = {"classes": [[encode(drawing(0)), encode(drawing(1))], [encode(drawing(2))]], "query": encode(drawing(3))}


def ask(server, method, path, body=None, headers=None):
    """The status, the headers and the text of an answer."""
    connection = http.client.HTTPConnection(playground.HOST, server.server_port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def predict(server, request):
    status, _, text = ask(server, "POST", "/predict", json.dumps(request))
    return status, json.loads(text)


def expected_steps(files, request):
    """The probabilities before the first and after every inner step, from `adapt` and `predict` of the library."""

    def read(text):
        pixels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(105, 105)
        return drawings.as_drawing(pixels, ink="light")

    support = drawings.as_batch([np.stack([read(text) for text in texts]) for texts in request["classes"]])
    query = drawings.as_inputs(read(request["query"])[None])
    way, steps = len(request["classes"]), {}
    for name in CONFIGS:
        learner, params, config = load_learner(files[name], way=way if name == "protonets" else None)
        num_steps = (0, 1) if name == "maml" else (None,)
        steps[name] = []
        for count in num_steps:
            stepped = build_learner(dataclasses.replace(config, inner_steps=count))
            task_params, _ = jax.jit(stepped.adapt)(params, support)
            outputs = jax.jit(learner.predict)(task_params, np.concatenate([support.inputs, query]))[-1]
            steps[name].append(jax.nn.softmax(outputs[:way]))  # of MAML's five outputs the first ones
    return steps


def test_the_endpoint_answers_as_the_library_does(server, files):
    status, answer = predict(server, REQUEST)
    assert status == 200
    expected = expected_steps(files, REQUEST)
    assert [method["name"] for method in answer["methods"]] == ["MAML", "ProtoNets"]
    for method, steps in zip(answer["methods"], expected.values(), strict=True):
        np.testing.assert_allclose(method["steps"], steps, atol=1e-5)
        np.testing.assert_allclose(np.sum(method["steps"], -1), 1, atol=1e-6)
    seen = np.frombuffer(base64.b64decode(answer["seen"]), np.uint8).reshape(28, 28, 1)
    np.testing.assert_array_equal(seen, drawings.as_drawing(drawing(3), ink="light"))


def test_the_page_is_one_file_and_loads_nothing_else(server):
    status, headers, text = ask(server, "GET", "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.findall(r"https?://|src=|@import", text)
    assert re.findall(r'href="([^"]*)"', text) == ["data:,"]
    status, _, text = ask(server, "GET", "/settings")
    assert json.loads(text) == {
        "canvas": 105,
        "classes": 5,
        "examples": 5,
        "methods": [
            {"name": "MAML", "outputs": 5, "made_by": "a test"},
            {"name": "ProtoNets", "outputs": None, "made_by": ""},
        ],
    }
    for method, path in (("GET", "/../README.md"), ("GET", "/predict"), ("POST", "/")):
        status, _, text = ask(server, method, path)
        assert status == 404
        assert json.loads(text)["error"]


def changed(**changes):
    return json.dumps(REQUEST | changes)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", r"the request is no JSON"),
        (b"\xff\xfe", r"the request is no JSON"),
        ("[" * 100_000, r"the request is no JSON"),
        ("[]", r'the request must be \{"classes"'),
        ('{"query": ""}', r'the request must be \{"classes"'),
        (changed(more=1), r'the request must be \{"classes"'),
        (changed(classes="abc"), r'"classes" must be a list of lists'),
        (changed(classes=["abc", "def"]), r'"classes" must be a list of lists'),
        (changed(classes=REQUEST["classes"][:1]), r"there are 1 symbols; draw between 2 and 5"),
        (changed(classes=REQUEST["classes"] * 3), r"there are 6 symbols; draw between 2 and 5"),
        (changed(classes=[*REQUEST["classes"], []]), r"symbol 3 has 0 drawings; draw it between 1 and 5 times"),
        (changed(classes=[REQUEST["classes"][0] * 3, []]), r"symbol 1 has 6 drawings"),
        (changed(query=None), r"the new drawing must be 105x105 bytes in base64"),
        (changed(query=[1, 2]), r"the new drawing must be 105x105 bytes in base64"),
        (changed(query="ü?"), r"the new drawing must be 105x105 bytes in base64"),
        (changed(query="AAAA"), r"the new drawing has 3 bytes; it must have 105x105 = 11025"),
        (changed(query=encode(drawing(0)[1:])), r"the new drawing has 10920 bytes"),
        (changed(query=encode(0 * drawing(0))), r"the new drawing is empty; draw something"),
        (changed(query=encode(drawing(0) // 50)), r"the new drawing: there is no light ink"),
        (changed(classes=[*REQUEST["classes"], ["AAAA"]]), r"a drawing of symbol 3 has 3 bytes"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(server, body, message):
    status, _, text = ask(server, "POST", "/predict", body)
    assert status == 400
    assert re.search(message, json.loads(text)["error"])


def test_outputs_that_are_not_finite_are_no_answer(server, monkeypatch):
    monkeypatch.setattr(server.playground, "_probabilities", lambda *task: [np.full((2, 2), np.nan), np.zeros((1, 2))])
    status, answer = predict(server, REQUEST)
    assert status == 400
    assert answer["error"] == "the outputs of MAML are not finite; draw the symbols in another way"


def test_the_length_of_a_request_is_said_and_limited(server):
    for length in ("", "-1", "ten", "1000001", "٣", 5000 * "9"):
        headers = {"Content-Length": length.encode()} if length else {"Transfer-Encoding": "chunked"}
        status, _, text = ask(server, "POST", "/predict", b"" if length else None, headers)
        assert status == 400
        assert "Content-Length, of at most 1000000 bytes" in json.loads(text)["error"]


def test_a_browser_that_leaves_early_is_no_error(server, monkeypatch, capfd):
    left = threading.Event()

    def predict(request):
        left.wait(60)
        return {"answer": 1_000_000 * "x"}

    monkeypatch.setattr(server.playground, "predict", predict)
    handled = threading.Event()
    shutdown_request = server.shutdown_request
    monkeypatch.setattr(server, "shutdown_request", lambda request: (shutdown_request(request), handled.set()))
    connection = socket.create_connection((playground.HOST, server.server_port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves with a reset
    connection.sendall(b"POST /predict HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
    connection.close()
    left.set()
    assert handled.wait(60)
    assert capfd.readouterr().err == ""
    monkeypatch.undo()
    assert ask(server, "GET", "/")[0] == 200


def test_programs_of_common_tasks_are_compiled_before_they_are_needed(server, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        server.playground, "_probabilities", lambda *task: compiled.append((len(task[0].targets), task[2]))
    )
    playground.warm_up(server.playground)
    assert compiled == [(way * count, way) for count in (1, 2, 3) for way in (2, 3, 4, 5)]


def test_what_is_missing_or_wrong_is_named(files, server, tmp_path):
    with pytest.raises(
        RunError,
        match=r"there is no .*none\.npz\. Make it with `python -m experiments\.omniglot maml .*experiments\.export",
    ):
        playground.Server(playground.Config(maml=tmp_path / "none.npz", protonets=files["protonets"], port=0))
    with pytest.raises(RunError, match=r"maml\.npz holds maml; give --protonets a file that holds protonets"):
        playground.Server(playground.Config(maml=files["maml"], protonets=files["maml"], port=0))
    with pytest.raises(RunError, match=f"the port {server.server_port} cannot be used .*; choose another --port"):
        playground.Server(playground.Config(**files, port=server.server_port))
    for port in (-1, 65536):
        with pytest.raises(ValueError, match="--port"):
            playground.Config(port=port)


# In a browser


def drag(page, pad, *points):
    """Draws a line through points between 0 and 1 on a pad."""
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def test_a_person_draws_symbols_and_sees_both_answers(server, files, browser):
    page = browser.new_page()
    problems, visited = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: visited.append(request.url))
    page.goto(server.address)
    message, rows = page.locator("#message"), page.locator(".symbol")
    page.wait_for_selector("#made-by:not(:empty)")
    assert "The network of MAML has 5 outputs." in page.locator("#outputs").inner_text()
    assert message.inner_text() == "Draw symbol A at least once, or remove it."
    page.get_by_label("remove symbol C").click()
    assert rows.count() == 2
    drag(page, rows.nth(0).locator("canvas").nth(0), (0.5, 0.1), (0.5, 0.9))
    drag(page, rows.nth(0).locator("canvas").nth(1), (0.4, 0.1), (0.4, 0.8))
    assert message.inner_text() == "Draw symbol B at least once."
    drag(page, rows.nth(1).locator("canvas").nth(0), (0.1, 0.5), (0.9, 0.5))
    assert message.inner_text() == "Now draw one of your symbols again."
    with page.expect_request("**/predict") as sent:
        drag(page, page.locator("#query canvas"), (0.2, 0.4), (0.8, 0.5))
    page.wait_for_selector(".verdict")

    request = json.loads(sent.value.post_data)
    assert [len(drawings) for drawings in request["classes"]] == [2, 1]
    line = np.frombuffer(base64.b64decode(request["classes"][0][0]), np.uint8).reshape(105, 105)
    rows_of_ink, columns_of_ink = np.nonzero(line > 127)
    assert (rows_of_ink.min(), rows_of_ink.max()) == (pytest.approx(9, abs=2), pytest.approx(96, abs=2))
    assert (columns_of_ink.min(), columns_of_ink.max()) == (pytest.approx(51, abs=2), pytest.approx(54, abs=2))
    cards = page.locator("#answers .card")
    assert cards.locator("h3").all_inner_texts() == ["MAML", "ProtoNets"]
    for index, steps in enumerate(expected_steps(files, request).values()):
        card, values = cards.nth(index), np.concatenate(steps)
        widths = card.locator(".fill").evaluate_all("fills => fills.map(fill => parseFloat(fill.style.width))")
        np.testing.assert_allclose(widths, 100 * values, atol=0.01)
        shown = [float(text.removesuffix(" %")) for text in card.locator(".number").all_inner_texts()]
        np.testing.assert_allclose(shown, 100 * values, atol=0.51)
        assert card.locator(".verdict").inner_text().startswith(f"it is {'AB'[int(np.argmax(steps[-1]))]}, ")
    labels = cards.nth(0).locator(".label").all_inner_texts()
    assert labels == ["before the first inner step", "after 1 inner step"]
    assert not problems
    assert all(url.startswith((server.address, "data:")) for url in visited)

    # A mistake that only the server notices is shown, and an erased drawing takes the answers away.
    reason = {"status": 400, "body": json.dumps({"error": "the new drawing is empty; draw something"})}
    page.route("**/predict", lambda route: route.fulfill(**reason))
    drag(page, page.locator("#query canvas"), (0.2, 0.2), (0.8, 0.8))
    page.wait_for_selector("#message.error")
    assert message.inner_text() == "the new drawing is empty; draw something"
    page.get_by_label("erase the new drawing").click()
    assert message.inner_text() == "Now draw one of your symbols again."
    assert cards.count() == 0
    for count in (3, 4, 5):
        page.get_by_text("Add a symbol").click()
        assert rows.count() == count
    assert page.get_by_text("Add a symbol").is_disabled()


def test_a_finger_draws_too_and_the_example_is_complete(server, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    page.goto(server.address)
    page.wait_for_selector("#made-by:not(:empty)")
    first = page.locator(".symbol").nth(0)
    first.locator("canvas").nth(0).tap()  # a dot
    assert first.locator(".pad:not(.empty)").count() == 1
    assert first.locator("canvas").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.get_by_text("Show an example").click()
    page.wait_for_selector(".verdict")
    assert page.locator("#answers .card").count() == 2
    page.get_by_text("Start again").click()
    assert page.locator(".pad:not(.empty)").count() == 0

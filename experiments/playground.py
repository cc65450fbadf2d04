"""A page in your browser on which you draw symbols, and MAML and ProtoNets learn them from a few examples each.

The page and its server run only on this computer: nothing is loaded from elsewhere, and no drawing is sent there.
Stop the server with Ctrl-C.
"""

import base64
import binascii
import dataclasses
import json
import os
import re
import sys
import threading
import time
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cli import Precision, main
from experiments.runs import RunError, console
from maml_jax import CATALOGUE
from maml_jax.portable import INK, Portable, build_learner, load_learner, outputs_by_step
from maml_jax.tasks import drawings
from maml_jax.types import Batch, check_integer

CANVAS = 105
"""Height and width of a drawing that the page sends; those of the originals of Omniglot."""
SIZE = 28
MAX_CLASSES, MAX_EXAMPLES = 5, 5
MAX_BYTES = 1_000_000
"""Of a request; the largest one of the page, 26 drawings in base64, has 400 kB."""
HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("playground.html")
PRETRAINED = Path(__file__).parent / "pretrained"
# The page is one file. With this header a browser refuses to load anything else for it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Which networks, and where the page is."""

    maml: Path = PRETRAINED / "omniglot_maml.npz"
    """MAML: a file that experiments.export made."""
    protonets: Path = PRETRAINED / "omniglot_protonets.npz"
    """ProtoNets: a file that experiments.export made."""
    port: int = 8000
    """The port of the page; 0 for any that is free."""
    open_browser: bool = True
    """Whether to open the page in the browser, where there is a screen."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""

    def __post_init__(self) -> None:
        """Raises ValueError for a port that cannot be."""
        if check_integer("--port", self.port, at_least=0) > 65535:
            raise ValueError(f"--port {self.port} is above 65535; choose a smaller one, or 0 for any that is free")


class RequestError(Exception):
    """A request that cannot be answered. The page shows the message."""


class Playground:
    """What the server answers with, from several threads."""

    def __init__(self, config: Config) -> None:
        """Reads the two files; see `open_file`."""
        self._methods = [open_file(config.maml, "maml"), open_file(config.protonets, "protonets")]
        # MAML's network adapts with the labels 0..n-1, and only its first n outputs are read.
        self._for_way = {
            way: [
                (build_learner(config, way=way if config.any_way else None), params)
                for _, params, config in self._methods
            ]
            for way in range(2, self.max_classes + 1)
        }
        self._lock = threading.Lock()

    @property
    def max_classes(self) -> int:
        """The largest number of classes that both algorithms can tell apart."""
        return min([MAX_CLASSES, *(config.way for _, _, config in self._methods if not config.any_way)])

    def settings(self) -> dict[str, Any]:
        """What the page needs to know before the first drawing."""
        methods = [
            {
                "name": CATALOGUE[config.algorithm].title,
                "outputs": None if config.any_way else config.way,
                "made_by": config.made_by,
            }
            for _, _, config in self._methods
        ]
        return {"canvas": CANVAS, "classes": self.max_classes, "examples": MAX_EXAMPLES, "methods": methods}

    def predict(self, request: Any) -> dict[str, Any]:
        """Adapts to the drawings of a request and classifies another one.

        Args:
          request: {"classes": [[drawing, ...], ...], "query": drawing}; a drawing is as `read_drawing` takes it.

        Returns:
          "seen", the query as the networks see it, base64 of 28x28 bytes; and "methods", for each algorithm its "name"
          and its "steps", the probabilities of the classes before the first and after every inner step.

        Raises:
          RequestError: if the request is anything else.
        """
        images, query = read_request(request, self.max_classes)
        found = self._probabilities(drawings.as_batch(images), drawings.as_inputs(query), len(images))
        names = [method["name"] for method in self.settings()["methods"]]
        for name, steps in zip(names, found, strict=True):
            if not np.isfinite(steps).all():
                raise RequestError(f"the outputs of {name} are not finite; draw the symbols in another way")
        return {
            "seen": base64.b64encode(query.tobytes()).decode(),
            "methods": [{"name": name, "steps": steps.tolist()} for name, steps in zip(names, found, strict=True)],
        }

    def warm_up(self, num_classes: int, num_examples: int) -> None:
        """Compiles the programs for a number of classes with so many drawings of each."""
        image = np.zeros((1, SIZE, SIZE, 1), np.uint8)
        support = drawings.as_batch([np.repeat(image, num_examples, 0)] * num_classes)
        self._probabilities(support, drawings.as_inputs(image), num_classes)

    def stop(self) -> None:
        """Waits for the running program and lets no other begin. The process may end then."""
        self._lock.acquire()  # a thread that compiles while the process ends would abort it

    def _probabilities(self, support: Batch, inputs: np.ndarray, way: int) -> list[np.ndarray]:
        """For each algorithm [K+1, N], the probabilities of one query."""
        with self._lock:  # two threads would compile the same program twice
            outputs = [
                np.asarray(outputs_by_step(learner, params, support, inputs), np.float64)[:, 0, :way]
                for learner, params in self._for_way[way]
            ]
        powers = [np.exp(values - values.max(-1, keepdims=True)) for values in outputs]
        return [values / values.sum(-1, keepdims=True) for values in powers]


def open_file(file: Path, algorithm: str) -> Portable:
    """Reads the file of an algorithm.

    Raises:
      RunError: if there is no such file, or it holds another algorithm or a network for other images.
      ValueError: if it cannot be used.
    """
    if not file.is_file():
        run_dir = f"runs/playground-{algorithm}"
        raise RunError(
            f"there is no {file}. Make it with `python -m experiments.omniglot {algorithm} --run-dir {run_dir}` and "
            f"`python -m experiments.export {run_dir} {file}`, or give another file with --{algorithm}"
        )
    loaded = load_learner(file)
    if loaded.config.algorithm != algorithm:
        raise RunError(f"{file} holds {loaded.config.algorithm}; give --{algorithm} a file that holds {algorithm}")
    if (loaded.config.input_shape, loaded.config.input_values) != ((SIZE, SIZE, 1), INK):
        raise RunError(
            f"{file} takes images of shape {list(loaded.config.input_shape)} ({loaded.config.input_values}); only "
            f"[{SIZE}, {SIZE}, 1] ({INK}) is drawn"
        )
    return loaded


def read_request(request: Any, max_classes: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The images of every class, uint8 [n, 28, 28, 1] each, and that of the query, [1, 28, 28, 1].

    Raises:
      RequestError: if the request is not as `Playground.predict` takes it.
    """
    if not isinstance(request, dict) or set(request) != {"classes", "query"}:
        raise RequestError('the request must be {"classes": [[drawing, ...], ...], "query": drawing}')
    classes = request["classes"]
    if not isinstance(classes, list) or not all(isinstance(texts, list) for texts in classes):
        raise RequestError('"classes" must be a list of lists of drawings')
    if not 2 <= len(classes) <= max_classes:
        raise RequestError(f"there are {len(classes)} symbols; draw between 2 and {max_classes}")
    for index, texts in enumerate(classes):
        if not 1 <= len(texts) <= MAX_EXAMPLES:
            raise RequestError(
                f"symbol {index + 1} has {len(texts)} drawings; draw it between 1 and {MAX_EXAMPLES} times"
            )
    images = [
        np.stack([read_drawing(text, f"a drawing of symbol {index + 1}") for text in texts])
        for index, texts in enumerate(classes)
    ]
    return images, read_drawing(request["query"], "the new drawing")[None]


def read_drawing(text: Any, name: str) -> np.ndarray:
    """One drawing as the networks take it, uint8 [28, 28, 1].

    Args:
      text: base64 of 105x105 bytes, row by row, ink 255 and background 0.
      name: what the drawing is called in messages.

    Raises:
      RequestError: if it is anything else, or nothing is drawn.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise RequestError(f"{name} must be {CANVAS}x{CANVAS} bytes in base64") from None
    if len(content) != CANVAS * CANVAS:
        raise RequestError(f"{name} has {len(content)} bytes; it must have {CANVAS}x{CANVAS} = {CANVAS * CANVAS}")
    pixels = np.frombuffer(content, np.uint8).reshape(CANVAS, CANVAS)
    if not pixels.any():
        raise RequestError(f"{name} is empty; draw something")
    try:
        return drawings.as_drawing(pixels, size=SIZE, ink="light")
    except ValueError as error:
        raise RequestError(f"{name}: {error}") from None


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page, GET /settings and POST /predict with JSON."""

    server: "Server"
    timeout = 60

    def do_GET(self) -> None:
        """The page and its settings."""
        if self.path in ("/", "/index.html"):
            self._send(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/settings":
            self._send_json(HTTPStatus.OK, self.server.playground.settings())
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"there is no page {self.path}; the page is /"})

    def do_POST(self) -> None:
        """Predictions."""
        if self.path != "/predict":
            self.close_connection = True
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"nothing is posted to {self.path}; post to /predict"})
            return
        try:
            self._send_json(HTTPStatus.OK, self.server.playground.predict(self._read_json()))
        except RequestError as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _read_json(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MAX_BYTES:
            self.close_connection = True  # what follows is not read
            raise RequestError(
                f"the request must say its Content-Length, of at most {MAX_BYTES} bytes, got {length[:20]!r}"
            )
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request is no JSON: {error}") from None

    def _send_json(self, status: HTTPStatus, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing for each request."""


class Server(ThreadingHTTPServer):
    """Serves the page once `serve_forever` is called.

    Attributes:
      playground: what it answers with.
      address: where the page is.
    """

    daemon_threads = True

    def __init__(self, config: Config) -> None:
        """Reads the files and takes the port.

        Raises:
          RunError: if a file is missing or holds another algorithm, or the port is in use.
          ValueError: if a file cannot be used.
        """
        self.playground = Playground(config)
        try:
            super().__init__((HOST, config.port), Handler)
        except OSError as error:
            raise RunError(
                f"the port {config.port} cannot be used ({error}); choose another --port, or 0 for any that is free"
            ) from error
        self.address = f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing when a browser leaves before its answer is written."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def warm_up(playground: Playground) -> None:
    """Compiles what tasks with up to three drawings of each symbol need, those with the fewest first."""
    for num_examples in (1, 2, 3):
        for num_classes in range(2, playground.max_classes + 1):
            playground.warm_up(num_classes, num_examples)
            time.sleep(0.05)  # lets a request that waits go first


def run(config: Config) -> None:
    """Serves the page until Ctrl-C."""
    with Server(config) as server:
        try:
            server.playground.warm_up(min(3, server.playground.max_classes), 1)
            threading.Thread(target=warm_up, args=(server.playground,), daemon=True).start()
            console.print(f"The page is at {server.address} (stop with Ctrl-C)")
            has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
            if config.open_browser and has_screen:
                webbrowser.open(server.address)
            server.serve_forever()
        except KeyboardInterrupt:
            server.playground.stop()
            console.print("stopped")


if __name__ == "__main__":
    # Each number of drawings is another program, and compiling it takes far longer than running it. JAX reads the flags
    # once, when it looks for devices.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    main(Config, run, __doc__)

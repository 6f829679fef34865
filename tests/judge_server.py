"""A local server that answers OpenAI chat completions as vLLM does, for the tests of remote rewards."""

import base64
import io
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image

HANG_UP = None  # a reply that drops the connection


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(self.server.models if self.path == "/v1/models" else (404, b"{}"))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            text, pictures = read(body)
        except Exception as error:
            return self.send((400, json.dumps({"error": {"message": repr(error)}}).encode()))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append((text, pictures))
        reply = self.server.answer(number, text, pictures, body)
        if isinstance(reply, dict):
            reply = 200, json.dumps({"object": "chat.completion", "model": body["model"],
                                     "choices": [reply]}).encode()
        self.send(reply)

    def send(self, reply):
        if reply is HANG_UP:
            return
        self.send_response(reply[0])
        self.send_header("Content-Length", str(len(reply[1])))
        self.end_headers()
        self.wfile.write(reply[1])

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # the client did not wait for the answer


@contextmanager
def serve(answer, models=(200, b'{"object": "list", "data": [{"id": "judge", "object": "model"}]}'), port=0):
    """Serve `answer(number, text, pictures, body)` -> a choice, (status, bytes) or HANG_UP; `asked` are the
    requests so far.
    """
    server = Server(("127.0.0.1", port), Handler)
    server.answer, server.models, server.asked, server.lock = answer, models, [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def read(body):
    """(text, pictures) of a request; refuses what vLLM refuses, and what would not give true probabilities.
    """
    (message,) = body["messages"]
    *images, text = message["content"]
    assert body["model"] == "judge" and message["role"] == "user" and text["type"] == "text"
    assert body["temperature"] == 0 and body["max_tokens"] > 0 and body["logprobs"] is True
    assert 5 <= body["top_logprobs"] <= 20
    pictures = []
    for part in images:
        assert part["type"] == "image_url"
        kind, data = part["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
    assert all(picture.format == "PNG" and picture.mode == "RGB" for picture in pictures)
    return text["text"], pictures


def choice(tokens, finish="stop"):
    """The answer of [(token, {token: log-prob})]."""
    entry = lambda token, logprob: {"token": token, "logprob": logprob, "bytes": list(token.encode())}
    content = [entry(token, tops[token]) | {"top_logprobs": [entry(*top) for top in tops.items()]}
               for token, tops in tokens]
    message = {"role": "assistant", "content": "".join(token for token, _ in tokens)}
    return {"index": 0, "message": message, "finish_reason": finish, "logprobs": {"content": content}}


class Judge:
    """Answers with a VLM from a directory, greedily, one request at a time."""

    def __init__(self, directory):
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        # without torchvision, as in model.py
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.images = AutoImageProcessor.from_pretrained(directory)
        self.vlm = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        self.lock = threading.Lock()

    def __call__(self, number, text, pictures, body):
        chat = [{"role": "user",
                 "content": [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        pixels = self.images(images=pictures, return_tensors="pt")
        sizes = iter((pixels["image_grid_thw"].prod(-1) // self.images.merge_size**2).tolist())
        text = re.sub(r"<\|image_pad\|>", lambda pad: pad[0] * next(sizes), text)
        inputs = self.tokenizer(text, add_special_tokens=False, return_token_type_ids=False,
                                return_tensors="pt")
        types = (inputs["input_ids"] == self.vlm.config.image_token_id).long()
        with self.lock, torch.no_grad():
            made = self.vlm.generate(**inputs, **pixels, mm_token_type_ids=types,
                                     max_new_tokens=body["max_tokens"],
                                     do_sample=False, output_logits=True, return_dict_in_generate=True)
        tokens, ids = [], made.sequences[0, inputs["input_ids"].shape[1]:].tolist()
        for token, logits in zip(ids, made.logits):
            logprobs, best = logits[0].log_softmax(-1).topk(body["top_logprobs"])
            tops = {self.tokenizer.decode([i]): logprob
                    for i, logprob in zip(best.tolist(), logprobs.tolist())}
            tokens.append((self.tokenizer.decode([token]), tops))
        return choice(tokens, "stop" if ids[-1] == self.tokenizer.eos_token_id else "length")

"""A server of one prompt-tuned model on transformers and PEFT, with dynamic batching: what gneiss serve is measured against.

    python benches/serve/peer.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter tutorial=runs/tutorial/adapter
        [--listen 127.0.0.1:0] [--threads 2] [--max-batch 32] [--pass-size 8] [--wait-ms 5]
        [--batching embeds|generate|prefix]

POST /v1/completions takes {"model", "prompt", "max_tokens", "temperature": 0} and answers in OpenAI's form; GET /health
answers 200. One line on standard output, `listening on http://HOST:PORT`, says that it is ready. Requests queue; a batch
is what waits, at most --max-batch, and an idle server waits --wait-ms for company. A batch is sorted by length and goes
through the model --pass-size texts at a time, so that little of it is padding. SIGTERM ends it.

--batching is how a batch of texts of unlike lengths goes through the model (README.md has the figures):

    embeds    pads, then the prompt's rows, then the text, as inputs_embeds to transformers' generate: exact
    generate  PeftModel.generate on left-padded ids: the prompt's rows, then the pads, then the text (PEFT #1093); its
              positions are not those of a text alone, so some answers differ
    prefix    the prompt's keys and values once at start, copied into each batch's cache; then two passes by hand: exact,
              and not PEFT's any more
"""

import argparse
import asyncio
import copy
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peft"))
import peft_step

MOST_BODY = 1 << 20


def main():
    args = arguments()
    peft_step.re_execute(args)
    engine = Engine(args)
    asyncio.run(serve(args, engine))
    return 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="GGUF file, or folder with a GGUF file or config.json")
    add("--adapter", type=named, required=True, metavar="NAME=DIR", help="the tuned prompt's name and folder")
    add("--listen", type=address, default=("127.0.0.1", 0), help="HOST:PORT; port 0 takes a free one")
    add("--threads", type=peft_step.positive, default=2)
    add("--dtype", choices=("f32", "bf16"), default="f32")
    add("--max-batch", type=peft_step.positive, default=32, help="requests a batch")
    add("--pass-size", type=peft_step.positive, default=8, help="requests that go through the model together")
    add("--wait-ms", type=float, default=5.0, help="how long the first of a batch waits for others")
    add("--batching", choices=("embeds", "generate", "prefix"), default="embeds")
    add("--plain-malloc", action="store_true", help="leave malloc as it comes")
    args = parser.parse_args()
    args.device = "cpu"
    return args


def named(text):
    name, found, folder = text.partition("=")
    if not name or not found or not Path(folder, "adapter_config.json").is_file():
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, DIR with an adapter_config.json, found {text!r}")
    return name, folder


def address(text):
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, found {text!r}")
    return host, int(port)


# ---------------------------------------------------------------- the model


class Engine:
    """The tuned model; answers batches of texts greedily."""

    def __init__(self, args):
        import torch
        from peft import PeftModel

        torch.set_num_threads(args.threads)
        self.torch, self.name = torch, args.adapter[0]
        self.tokenizer, base = peft_step.load(args)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        base.config.use_cache = base.generation_config.use_cache = True
        self.model = PeftModel.from_pretrained(base, args.adapter[1]).eval()
        self.base = self.model.get_base_model()
        self.prompt = self.model.get_prompt(batch_size=1).detach().to(base.dtype)
        self.answers = getattr(self, args.batching)
        self.prefix_cache = self.run_prefix() if args.batching == "prefix" else None

    def complete(self, texts, max_tokens):
        """[(text, finish reason, generated tokens, prompt tokens)] of a batch."""
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        with self.torch.inference_mode():
            rows = self.answers(encoded.input_ids, encoded.attention_mask, max_tokens).tolist()
        return [self.finished(row, int(mask.sum())) for row, mask in zip(rows, encoded.attention_mask)]

    def finished(self, row, prompt_tokens):
        eos = self.tokenizer.eos_token_id
        kept = row[: row.index(eos)] if eos in row else row
        reason = "stop" if eos in row else "length"
        return self.tokenizer.decode(kept), reason, len(kept) + (reason == "stop"), prompt_tokens

    def generate(self, ids, mask, max_tokens):
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id)
        return out[:, ids.shape[1] :]

    def embeds(self, ids, mask, max_tokens):
        virtual = self.prompt.shape[1]
        batch, width = ids.shape
        text = self.base.get_input_embeddings()(ids)
        inputs = text.new_zeros(batch, virtual + width, text.shape[2])
        attend = mask.new_zeros(batch, virtual + width)
        for row, length in enumerate(mask.sum(1).tolist()):
            start = width - length
            inputs[row, start : start + virtual] = self.prompt[0]
            inputs[row, start + virtual :] = text[row, start:]
            attend[row, start:] = 1
        return self.base.generate(
            inputs_embeds=inputs, attention_mask=attend, max_new_tokens=max_tokens, do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id)

    def run_prefix(self):
        with self.torch.inference_mode():
            return self.base(inputs_embeds=self.prompt, use_cache=True, logits_to_keep=1).past_key_values

    def prefix(self, ids, mask, max_tokens):
        torch, virtual, batch = self.torch, self.prompt.shape[1], len(ids)
        cache = copy.deepcopy(self.prefix_cache)
        cache.batch_repeat_interleave(batch)
        attend = torch.cat([mask.new_ones(batch, virtual), mask], 1)
        positions = (attend.cumsum(1) - 1).clamp(min=0)[:, virtual:]
        rows, alive = [], torch.ones(batch, dtype=torch.bool)
        step = ids
        for _ in range(max_tokens):
            out = self.base(input_ids=step, attention_mask=attend, position_ids=positions, past_key_values=cache,
                            use_cache=True, logits_to_keep=1)
            step = out.logits[:, -1].argmax(-1, keepdim=True)
            rows.append(step)
            alive &= step[:, 0] != self.tokenizer.eos_token_id
            if not alive.any():
                break
            attend = torch.cat([attend, attend.new_ones(batch, 1)], 1)
            positions = positions[:, -1:] + 1
        return torch.cat(rows, 1)


# ---------------------------------------------------------------- batching and HTTP


async def serve(args, engine):
    loop, queue, stop = asyncio.get_running_loop(), asyncio.Queue(), asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    batcher = asyncio.create_task(batches(args, engine, queue))
    batcher.add_done_callback(lambda _: stop.set())
    server = await asyncio.start_server(lambda r, w: connection(r, w, engine, queue), *args.listen, backlog=256)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"listening on http://{host}:{port}", flush=True)
    await stop.wait()
    server.close()
    if batcher.done():
        batcher.result()  # what ended it
    batcher.cancel()


async def batches(args, engine, queue):
    """Answers what waits, a batch at a time, in a thread of its own so that requests are read meanwhile."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as thread:
        while True:
            batch = [await queue.get()]
            end = loop.time() + args.wait_ms / 1000
            while len(batch) < args.max_batch:
                try:
                    batch.append(queue.get_nowait())
                except asyncio.QueueEmpty:
                    if (left := end - loop.time()) <= 0:
                        break
                    try:
                        batch.append(await asyncio.wait_for(queue.get(), left))
                    except TimeoutError:
                        break
            for max_tokens in {most for _, most, _ in batch}:
                same = [(text, future) for text, most, future in batch if most == max_tokens]
                same.sort(key=lambda asked: len(asked[0]))
                for at in range(0, len(same), args.pass_size):
                    part = same[at : at + args.pass_size]
                    done = await loop.run_in_executor(thread, engine.complete, [text for text, _ in part], max_tokens)
                    for (_, future), answer in zip(part, done):
                        if not future.cancelled():
                            future.set_result(answer)


async def connection(reader, writer, engine, queue):
    """HTTP/1.1 with keep-alive, as much of it as a load client needs."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            request, *lines = head.decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
            length = int(headers.get("content-length", 0))
            if length > MOST_BODY:
                break
            body = await reader.readexactly(length)
            status, answer = await respond(request, body, engine, queue)
            data = json.dumps(answer).encode()
            writer.write(b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                         % (status.encode(), len(data), data))
            await writer.drain()
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError):
        pass  # a client that left, or no HTTP
    finally:
        writer.close()


async def respond(request, body, engine, queue):
    if request.startswith("GET /health "):
        return "200 OK", {"status": "ok"}
    if not request.startswith("POST /v1/completions "):
        return "404 Not Found", error("no such path")
    try:
        asked = json.loads(body)
        text, most = asked["prompt"], asked.get("max_tokens", 16)
    except (ValueError, KeyError, TypeError) as problem:
        return "400 Bad Request", error(f"expected a completion request, found {problem!r}")
    if asked.get("model") != engine.name or not isinstance(text, str) or not isinstance(most, int) or most < 1:
        return "400 Bad Request", error(f"expected model {engine.name!r}, a text as prompt and max_tokens of 1 or more")
    future = asyncio.get_running_loop().create_future()
    queue.put_nowait((text, most, future))
    answer, reason, generated, prompt_tokens = await future
    return "200 OK", {
        "id": f"cmpl-{time.monotonic_ns():x}", "object": "text_completion", "created": int(time.time()),
        "model": engine.name,
        "choices": [{"index": 0, "text": answer, "finish_reason": reason, "logprobs": None}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": generated,
                  "total_tokens": prompt_tokens + generated},
    }


def error(message):
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


if __name__ == "__main__":
    sys.exit(main())

"""What /metrics tells: TGI's names, kept by prometheus-client in a registry of its own."""

import asyncio
import re
from collections.abc import Callable
from operator import attrgetter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from minivlm.serve.jobs import EngineState, Step

SECONDS = tuple(0.0001 * 1.5**n for n in range(36))  # a tenth of a millisecond to two and a half minutes
TOKENS = tuple(2.0**n for n in range(17))
# Of the engine's numbers, those that TGI has no name for.
EXTRA = ("cache_bytes", "kept_tokens", "prefix_hits", "prefix_tokens", "copied_tokens", "pictures", "picture_bytes",
         "picture_hits", "pictures_encoded", "prompt_tokens", "generated_tokens", "cancelled")  # fmt: skip
ROWS = tuple(2.0**n for n in range(10))
# TGI's counters are named without the `_total` that prometheus-client puts behind them.
COUNTER = re.compile(rb"^((?:# (?:HELP|TYPE) )?tgi_\w+_(?:count|success|failure))_total\b", re.MULTILINE)


def _no_engine() -> EngineState:
    raise RuntimeError("metrics: no engine was named")


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.state: Callable[[], EngineState] = _no_engine
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"tgi_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"tgi_{name}", text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, value: Callable[[EngineState], float]) -> None:
            Gauge(name, text, registry=registry).set_function(lambda: value(self.state()))

        self.requests = counter("request_count", "Answers that were asked for")
        self.successes = counter("request_success", "Answers that were given whole")
        self.failures = counter("request_failure", "Requests refused or failed", ("err",))
        self.duration = histogram("request_duration", "Seconds from request to the end of its answer")
        self.validation = histogram("request_validation_duration", "Seconds to check a request and open its pictures")
        self.queue = histogram("request_queue_duration", "Seconds that an answer waited for its turn")
        self.inference = histogram("request_inference_duration", "Seconds that the model worked on an answer")
        self.per_token = histogram("request_mean_time_per_token_duration", "Mean seconds between an answer's tokens")
        self.input_length = histogram("request_input_length", "Tokens of a prompt, its image tokens included", TOKENS)
        self.max_new_tokens = histogram("request_max_new_tokens", "Tokens that an answer might have had", TOKENS)
        self.generated = histogram("request_generated_tokens", "Tokens of an answer", TOKENS)
        self.skipped = histogram("request_skipped_tokens", "Tokens of an answer that were guessed ahead: none", TOKENS)
        self.steps = counter("batch_inference_count", "Steps of the batch")
        self.good_steps = counter("batch_inference_success", "Steps of the batch that no error ended")
        self.step_seconds = histogram("batch_inference_duration", "Seconds of a step of the batch")
        self.forward = histogram("batch_forward_duration", "Seconds of a step, sampling included")
        self.decode = histogram("batch_decode_duration", "Seconds of a step that computed no prompt")
        self.batch_size = histogram("batch_next_size", "Answers in a step of the batch", ROWS)
        gauge("tgi_queue_size", "Answers that wait", lambda state: state.queued)
        gauge("tgi_batch_current_size", "Answers that run", lambda state: state.running)
        gauge("tgi_batch_current_max_tokens", "Positions that the running answers may fill",
              lambda state: state.running * state.max_total_tokens)  # fmt: skip
        gauge("tgi_batch_total_tokens", "Positions that the running answers fill", lambda state: state.batch_tokens)
        for name in EXTRA:
            gauge(f"minivlm_{name}", f"The engine's `{name}`", attrgetter(name))
        tasks = Gauge("minivlm_asyncio_tasks", "Tasks of the event loop", registry=registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))

    def step(self, step: Step) -> None:
        """Called by the engine after each step."""
        self.steps.inc()
        self.good_steps.inc()
        self.step_seconds.observe(step.seconds)
        self.forward.observe(step.seconds)
        self.batch_size.observe(step.rows)
        if not step.positions:
            self.decode.observe(step.seconds)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return COUNTER.sub(rb"\1", generate_latest(self.registry))

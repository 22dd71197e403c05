"""`sample`: answers to prompts, scored and chosen among, as candidates, pairs or rows."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress

from luthier import config as configs
from luthier.contracts import Candidate, DataSource, Place, Row, Selector
from luthier.data import asked, read
from luthier.errors import ConfigError, DataError, unknown
from luthier.models import LoadedModel, load_model
from luthier.policy import Answer, Decoding, ModelPolicy, answers, check_room, check_speaks, policy_of
from luthier.text import Codec
from luthier_plugins.commands.sample.candidates import WRITES, Answered, Writer
from luthier_plugins.commands.sample.journal import Journal
from luthier_plugins.commands.sample.prompt_source import Prompted
from luthier_plugins.commands.sample.report import SampleResult, show_answers, show_result
from luthier_plugins.commands.sample.statistics import SampleStatistics, draw_curve
from luthier_toolkits.rewards import Scores, Scoring
from luthier_toolkits.terminal import SafeConsole

log = logging.getLogger("luthier")
TOGETHER = 8
"""Batches of answers that are made, scored and written as one part."""


def sample(config: DictConfig) -> SampleResult:
    """Answer prompts and write what `config.write` says, one JSON object a line; what was stopped goes on.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    _check(config)
    sampling = _Sampling.prepare(config)
    journal = Journal(Path(config.out).expanduser(), sampling.digest()) if config.out else None
    try:
        statistics = sampling.run(journal)
        result = SampleResult.of(statistics, journal.out if journal else None, sampling.selector)
        if config.picture:
            draw_curve(result.curve, Path(config.picture).expanduser())
    except BaseException:
        if journal:
            journal.abandon()
        raise
    if journal:
        journal.close()
    show_result(result, config.write, config.picture)
    return result


def _check(config: DictConfig) -> None:
    if config.write not in WRITES:
        raise ConfigError(unknown("write", str(config.write), WRITES))
    for key in ("n", "temperature", "max_new_tokens", "batch_size", "pairs_each", "pack_tokens"):
        if not 0 < config[key] < math.inf:
            raise ConfigError(f"{key}={config[key]} must be positive")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p} must be in (0, 1]")
    if (config.data is None) == (config.prompt is None):
        raise ConfigError("expected prompts: either data=SOURCE or prompt='…'")
    if config.out is None and (config.data is not None or config.write != "candidates"):
        raise ConfigError(
            "out is missing: the file to write; only the answers to prompt='…' are shown without one"
        )
    if config.picture and config.n < 2:
        raise ConfigError(f"picture={config.picture} draws score against N, and n={config.n}")


@dataclass(frozen=True)
class _Sampling:
    """Everything that answers, scores and chooses."""

    config: DictConfig
    loaded: LoadedModel
    policy: ModelPolicy
    codec: Codec
    source: DataSource
    rows: Sequence[Row]
    prompts: Sequence[Sequence[int]]
    scoring: Scoring | None
    selector: Selector
    decoding: Decoding

    @classmethod
    def prepare(cls, config: DictConfig) -> _Sampling:
        """Build every method, load the model, read and tokenise the prompts."""
        quantiser = configs.build("quantiser", config.quantiser) if config.quantiser else None
        selector: Selector = configs.build("selector", config.selector)
        typed = Prompted.of(config.prompt)
        source: DataSource = configs.build("data_source", config.data) if config.data else typed
        loaded = load_model(config.model, train_base=False, quantiser=quantiser)
        codec = Codec(loaded.tokenizer)
        source = source if config.data else replace(typed, chat=codec.has_template)
        rows = _rows(config, source, codec)
        prompts = [codec.prompt_ids(r.fields["prompt"], r.origin, r.fields.get("tools")) for r in rows]
        check_room(prompts, rows, loaded.context)
        check_speaks(loaded)
        policy = policy_of(loaded, config.model.fused)
        place = Place(source, loaded, config.model.device, config.model.dtype, config.pack_tokens)
        scoring = Scoring.of(config.reward_models, place)
        decoding = Decoding(
            config.max_new_tokens, config.batch_size, config.n, config.temperature, config.top_p
        )
        return cls(config, loaded, policy, codec, source, rows, prompts, scoring, selector, decoding)

    def digest(self) -> str:
        """Return a hash of all that decides what is written: options, model and prompts."""
        options = OmegaConf.to_container(self.config, resolve=True)
        assert isinstance(options, dict)
        kept = {key: value for key, value in options.items() if key not in ("out", "picture", "plugins")}
        text = json.dumps([kept, self.loaded.name, self.prompts], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def run(self, journal: Journal | None) -> SampleStatistics:
        """Answer part after part; those that `journal` has already are left out."""
        statistics = SampleStatistics(**journal.state) if journal and journal.state else SampleStatistics()
        size = TOGETHER * max(1, self.decoding.batch_size // self.decoding.n)
        console = SafeConsole(stderr=True)
        with Progress(console=console, transient=True) as progress, torch.random.fork_rng():
            bar = progress.add_task("answers", total=len(self.rows))
            for number, first in enumerate(range(0, len(self.rows), size)):
                places = range(first, min(first + size, len(self.rows)))
                if journal is None or number >= journal.parts:
                    # A seed of its own for every part: where a run was stopped leaves no trace.
                    torch.manual_seed(self.config.seed * 1_000_003 + number)
                    self._part(places, statistics, journal, lambda: progress.advance(bar))
                else:
                    progress.advance(bar, len(places))
        if statistics.scored == statistics.prompts and statistics.flat == statistics.prompts:
            log.warning("all answers to every prompt have the same score: there is no signal to choose by")
        return statistics

    def _part(
        self,
        places: range,
        statistics: SampleStatistics,
        journal: Journal | None,
        advance: Callable[[], None],
    ) -> None:
        answered = self._answered(places, advance)
        lines = []
        for answered_prompt in answered:
            own = list(self._writer.lines(answered_prompt))
            statistics.add(answered_prompt, len(own), self.selector)
            lines += own
        if journal:
            journal.add(lines, statistics.state())
        else:
            show_answers(answered)

    @property
    def _writer(self) -> Writer:
        config = self.config
        least = config.min_score
        if least is None and self.scoring is None and self.selector.needs_scores:
            least = 1.0  # partial credit is not a right answer
        return Writer(config.write, least, config.pairs_each, config.gold)

    def _answered(self, places: range, advance: Callable[[], None]) -> list[Answered]:
        """Return what became of the prompts at `places`, in order."""
        made = answers(self.policy, self.codec, [self.prompts[place] for place in places], self.decoding)
        replies: dict[int, list[Answer]] = {}
        for turn, own in made:
            replies[places[turn]] = own
            advance()
        candidates = {place: self._candidates(self.rows[place], replies[place]) for place in places}
        scored = self._scored([candidate for place in places for candidate in candidates[place]])
        answered, first = [], 0
        for place in places:
            stop = first + len(candidates[place])
            parts = {name: part[first:stop] for name, part in scored.parts.items()} if scored else {}
            total = scored.total[first:stop] if scored else None
            answered.append(self._chosen(self.rows[place], candidates[place], total, parts))
            first = stop
        return answered

    def _candidates(self, row: Row, own: Sequence[Answer]) -> list[Candidate]:
        prompt = row.fields["prompt"]
        return [
            Candidate(prompt, answer.after(prompt), len(answer.ids), answer.finished, row) for answer in own
        ]

    def _scored(self, candidates: Sequence[Candidate]) -> Scores | None:
        return self.scoring(candidates) if self.scoring else None

    def _chosen(
        self,
        row: Row,
        candidates: Sequence[Candidate],
        scores: torch.Tensor | None,
        parts: dict[str, torch.Tensor],
    ) -> Answered:
        verified = [self._verified(row, candidate) for candidate in candidates]
        rights = [None if value is None else value >= 1.0 and candidate.finished
                  for value, candidate in zip(verified, candidates, strict=True)]  # fmt: skip
        if scores is None and None not in verified:
            scores = torch.tensor([value or 0.0 for value in verified])
        chosen = None
        if scores is not None or not self.selector.needs_scores:
            chosen = self.selector.choose(
                candidates, torch.zeros(len(candidates)) if scores is None else scores
            )
        elif self.config.write != "candidates":
            raise DataError(
                f"{row.origin}: nothing says which answers are right: set write=candidates, or reward_model=…"
            )
        return Answered(row, candidates, rights, scores, parts, chosen)

    def _verified(self, row: Row, candidate: Candidate) -> float | None:
        try:
            return self.source.verify(row, candidate.completion.strip())
        except DataError:
            raise
        except Exception as error:
            if self.scoring:  # which the user chose to score by; a verifier among them says it itself
                return None
            raise DataError(
                f"{row.origin}: verifying failed ({type(error).__name__}: {error}); reward_model=[verifier] "
                "reward_models.verifier.on_error=zero counts such answers as wrong"
            ) from error


def _rows(config: DictConfig, source: DataSource, codec: Codec) -> list[Row]:
    filters = [configs.build("row_filter", node) for node in (config.get("row_filters") or {}).values()]
    rows = list(_with_prompts(read(source, codec.has_template, filters, dropped=Counter())))
    if not rows:
        raise DataError("the data holds no row to answer")
    return rows


def _with_prompts(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        if (answered := asked(row)) is None:
            has = ", ".join(row.fields) or "nothing"
            raise DataError(f"{row.origin}: has {has}; an answer needs 'prompt'; rename with data.columns")
        yield answered

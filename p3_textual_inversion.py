r"""Textual inversion: a frozen text-to-image model learns a new word from a few images.

Only the embedding of the new word is trained, with the loss that trained the model itself. The word
then works in any prompt: "A <new1> on a striped pink background". The model is Stable Diffusion v1
from its own file, or a small one that `train-model` trains on captioned drawings.

Papers: Gal et al., An Image is Worth One Word, 2022, https://arxiv.org/abs/2208.01618
Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
https://arxiv.org/abs/2112.10752

    python p3_textual_inversion.py train hw2_data/textual_inversion/input.json \
        --output-dir runs/p3/words
    python p3_textual_inversion.py generate hw2_data/textual_inversion/input.json \
        runs/p3/images --embeddings runs/p3/words/words.safetensors
    python p3_textual_inversion.py train input.json --model sd-v1-4.ckpt \
        --output-dir runs/p3/sd-words
    python p3_textual_inversion.py train-model --data-dir hw2_data --output-dir runs/p3/model

The first two commands need no download.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tyro.conf import Positional, arg

from common.cli import UserError, above, at_least, in_range, is_seed, run_cli
from common.data import decode_images, list_images, normalise, to_uint8
from common.device import Device, Precision, make_accelerator, peak_memory
from common.figures import save_curves, save_image
from common.files import atomic_write, make_output_dir
from common.json_files import read_json
from common.processes import my_share
from common.progress import show_progress
from common.rng import make_rng
from common.run import Run
from common.trackers import Tracker
from inversion.concepts import (
    Concept,
    Kind,
    is_word,
    read_concepts,
    read_words,
    save_words,
    templates_of,
)
from inversion.models import (
    Loaded,
    embed_prompts,
    encode_prompts,
    image_errors,
    load_model,
    random_steps,
    rows_of,
    word_ids,
)
from inversion.sampling import Sampling, Solver, sample
from inversion.tokens import Tokenizer
from inversion.train_model import TrainModel, train_model

if TYPE_CHECKING:
    from accelerate import Accelerator

SMALL_MODEL = Path(__file__).parent / "checkpoints" / "text_to_image.safetensors"
# Where `generate` looks for learned words: beside MODEL, then in checkpoints/.
WORDS_FILES = {
    "stable-diffusion": "sd_words.safetensors",
    "small": "text_to_image_words.safetensors",
}
STYLES = {"stable-diffusion": "painting", "small": "sketch"}  # which a new style starts from
SLOW = 2.0  # seconds of a call of the network that is not timed a second time
InputFile = Annotated[Positional[Path], arg(metavar="INPUT.json")]


@dataclass(kw_only=True)
class Train:
    """Learn the new words of INPUT.json, or the one word of the images in a folder."""

    input_json: Annotated[Positional[Path | None], arg(metavar="INPUT.json")] = None
    """The course's file of concepts; not needed if --images has the images of one word."""
    images: Path | None = None
    """Folder with 0/, 1/, ... for INPUT.json (by default its own), or with one word's images."""
    token: str = "<new1>"
    """The new word, if there is no INPUT.json."""
    kind: tuple[Kind, ...] = ()
    """Templates of each word's captions; by INPUT.json's prompts if not given, or else object."""
    init: tuple[str, ...] = ()
    """Known words to start from, one each; by default src_image, or another style for a style."""
    model: Path = SMALL_MODEL
    """Stable Diffusion v1 (.ckpt or .safetensors), or a model of `train-model`."""
    output_dir: Path
    """Folder for words.safetensors and a run directory for each word."""
    vectors: int = 1
    """Vectors of a word: more can describe more, but make a prompt's other words weaker."""
    norm: Literal["keep", "free"] = "keep"
    """Keep the norm of the known word, or let it grow."""
    steps: int = 400
    """Training steps for each word."""
    batch_size: int = 4
    """Images of a step."""
    lr: float = 5e-3
    """Learning rate of Adam, which has no weight decay."""
    flip: bool = True
    """Mirror half of the images."""
    step_power: float = 0.0
    """Steps t are drawn with a density proportional to t to this power: 0 draws all equally often,
    more prefers noisy steps."""
    snapshot_every: int = 100
    """Steps between snapshots of the word, which show how it grows."""
    seed: int = 0
    """Seed of order, captions and noise."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """The frozen U-Net of Stable Diffusion in bf16 where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        if not is_word(self.token):
            raise UserError(f"--token {self.token!r}: must be one word, such as <new1>")
        in_range("--vectors", self.vectors, 1, 16)
        at_least("--steps", self.steps, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--step-power", self.step_power, 0, 10)
        at_least("--snapshot-every", self.snapshot_every, 1)
        is_seed("--seed", self.seed)
        if self.input_json is None and self.images is None:
            raise UserError("train: give INPUT.json, or --images with the images of one word")


@dataclass(kw_only=True)
class Generate:
    """Draw images of all prompts of INPUT.json, as OUT/<concept>/<prompt>/source0_prompt0_7.png.

    The same command again draws the images that are missing.
    """

    input_json: InputFile
    """The course's file of concepts."""
    output_dir: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder for the images; a folder of a prompt may hold nothing else."""
    model: Annotated[Positional[Path], arg(metavar="MODEL")] = SMALL_MODEL
    """Stable Diffusion v1 (.ckpt or .safetensors), or a model of `train-model`."""
    embeddings: tuple[Path, ...] = ()
    """Files of learned words; by default those beside MODEL or in checkpoints/."""
    count: int = 25
    """Images of each prompt."""
    steps: int = 50
    """Steps of the sampler."""
    guidance: float | None = None
    """Guidance scale: 1 is none; 7.5 for Stable Diffusion and 3 for the small model by default."""
    solver: Solver = "dpm"
    """DPM-Solver++(2M), or DDIM with eta = 0."""
    batch_size: int | None = None
    """Images computed at a time: 25 for the small model, 5 or (on a CPU) 1 for the other."""
    seed: int = 0
    """Seed of the noise; image k of every prompt depends on the seed and on k only."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """The U-Net of Stable Diffusion in bf16 where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        in_range("--count", self.count, 1, 100_000)
        in_range("--steps", self.steps, 1, 1_000)
        in_range("--guidance", self.guidance, 0, 100)
        if self.batch_size is not None:
            in_range("--batch-size", self.batch_size, 1, 10_000)
        is_seed("--seed", self.seed)


# Learning a word


class NewWord(nn.Module):
    """The vectors of a new word, which are all that is trained."""

    snapshots: Tensor
    norms: Tensor

    def __init__(self, start: Tensor, snapshots: int) -> None:
        """`start` (vectors, width) is what the word starts from."""
        super().__init__()
        self.rows = nn.Parameter(start.clone())
        self.register_buffer("snapshots", start.repeat(snapshots, 1, 1))
        self.register_buffer("norms", start.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def keep_norm(self) -> None:
        """Give each vector the norm that it started with.

        Left alone it grows to several times that of known words, and then drowns the rest of a
        prompt.
        """
        self.rows.mul_(self.norms / self.rows.norm(dim=1, keepdim=True))


@dataclass(frozen=True)
class Latents:
    """What is diffused for each training image: mean and standard deviation (n, *shape)."""

    mean: Tensor
    deviation: Tensor

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """A draw (batch, *shape) for the images of these rows."""
        rows = rows.to(self.mean.device)
        noise = torch.randn(self.mean[rows].shape, generator=rng).to(self.mean.device)
        return self.mean[rows] + self.deviation[rows] * noise


def learn(
    args: Train, concept: Concept, kind: Kind, init: str, latents: Latents, loaded: Loaded
) -> Tensor:
    """Learn one word; returns its vectors (vectors, width). A finished run is read again."""
    net, schedule = loaded.net, loaded.schedule
    folder = args.output_dir / concept.name
    accelerator = make_accelerator(args.device, "fp32", args.log_with, folder)
    if accelerator.num_processes > 1:
        raise UserError("a word is learned in one process")
    # What INPUT.json says is an argument of the run too: another file must not continue this run.
    chosen = {"token": concept.word, "kind": (kind,), "init": (init,)}
    run = Run(replace(args, output_dir=folder, **chosen), accelerator)
    if run.result is not None:
        return read_words(run.dir / "word.safetensors")[concept.word]
    tokenizer = Tokenizer(net.length, {concept.word: args.vectors})
    captions = [template.format(concept.word) for template in templates_of(kind, loaded.which)]
    ids = tokenizer(captions).to(loaded.device)  # (captions, length)
    start = start_of(init, args.vectors, loaded)

    word = NewWord(start, snapshots=args.steps // args.snapshot_every + 1)
    adam = torch.optim.Adam(word.parameters(), args.lr)
    parts = {"word": word, "adam": adam}
    table_before = digest_of_table(net)
    first = run.load_state(parts)
    for step in run.steps(first, args.steps, args.batch_size):
        rng = make_rng(args.seed, "inversion", step)
        rows = torch.randint(len(latents.mean), (args.batch_size,), generator=rng)
        x0 = latents.draw(rows, rng)
        chosen = torch.randint(len(ids), (args.batch_size,), generator=rng)

        # The usual loss of the diffusion model; the gradient ends at the vectors of the word.
        states = net.encode_text(embed_prompts(net, ids[chosen], word.rows))
        t = random_steps(schedule.T, args.batch_size, args.step_power, rng).to(loaded.device)
        eps = torch.randn(x0.shape, generator=rng).to(loaded.device)
        output = net.predict(schedule.q_sample(x0, t, eps), schedule.time(t, net), states)
        loss = image_errors(schedule, output, x0, t, eps).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if args.norm == "keep":
            word.keep_norm()

        norm = word.rows.detach().norm(dim=1).mean()
        moved = (word.rows.detach() - start).norm(dim=1).mean()
        run.add_losses(step, {"loss": loss, "norm": norm, "moved": moved})
        done = step + 1
        if done % args.snapshot_every == 0:
            word.snapshots[done // args.snapshot_every] = word.rows.detach()
            run.log_metrics({"step": done} | run.epoch_means(args.snapshot_every))
        if run.save_due() or done == args.steps:
            run.save_state(done, parts)

    if digest_of_table(net) != table_before:
        raise AssertionError("the embeddings of other words have changed")
    save_words(run.dir / "word.safetensors", {concept.word: word.rows})
    save_words(run.dir / "snapshots.safetensors", named_snapshots(word, args.snapshot_every))
    if run.rows:
        draw_curves(run, run.history())
    run.finish(
        {
            "word": concept.word,
            "init": init,
            "kind": kind,
            "images": len(latents.mean),
            "norm": word.rows.norm(dim=1).tolist(),
            "table_sha256": table_before,
        }
    )
    return word.rows.detach()


@torch.inference_mode()
def encode_folder(folder: Path, loaded: Loaded, flip: bool) -> Latents:
    """Encode the images of a folder once, and with `flip` their mirror images too."""
    size = loaded.net.image_size
    pixels = decode_images(list_images(folder), (size, size))
    if flip:
        pixels = torch.cat([pixels, pixels.flip(3)])
    means = []
    deviations = []
    images = normalise(pixels)[:, None]  # one at a time: (1, 3, size, size)
    for image in show_progress(images, len(images), f"encoding {folder}"):
        mean, deviation = loaded.net.encode(image.to(loaded.device))
        means.append(mean)
        deviations.append(deviation)
    # Tensors made in inference mode cannot be part of a graph; their copies can.
    return Latents(torch.cat(means).clone(), torch.cat(deviations).clone())


def start_of(init: str, vectors: int, loaded: Loaded) -> Tensor:
    """What a word starts from (vectors, width): the embeddings of known words.

    The last of them is repeated if there are fewer than vectors.
    """
    ids = word_ids(loaded, init)
    if len(ids) > vectors:
        raise UserError(
            f"--init {init}: is {len(ids)} tokens long; take a shorter word or --vectors {len(ids)}"
        )
    ids += [ids[-1]] * (vectors - len(ids))
    return rows_of(loaded, ids)


def digest_of_table(net: Any) -> str:
    """A hash of the embeddings of all known tokens."""
    table = net.text_encoder.text_model.embeddings.token_embedding.weight
    return hashlib.sha256(table.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def named_snapshots(word: NewWord, every: int) -> dict[str, Tensor]:
    """The vectors after 0, every, 2 every, … steps, by name: step_000100."""
    return {f"step_{every * k:06d}": rows for k, rows in enumerate(word.snapshots)}


def draw_curves(run: Run, history: list[dict[str, Any]]) -> None:
    """Draw the loss, and how the vectors move."""
    panels = {"loss": ["loss"], "vectors of the word": ["norm", "moved"]}
    save_curves(history, panels, run.dir / "figures" / "loss.png", x="step")


# The commands


def train(args: Train) -> None:
    """Learn all words, one after the other, and write words.safetensors with all of them."""
    concepts, folders = what_to_learn(args)
    loaded = load_model(args.model, args.device, args.precision)
    kinds = one_each("--kind", args.kind or tuple(concept.kind for concept in concepts), concepts)
    inits = one_each("--init", args.init or guessed_inits(concepts, loaded), concepts)
    for concept, init, folder in zip(concepts, inits, folders, strict=True):
        list_images(folder)  # mistakes come before the first training
        if not init:
            raise UserError(
                f"--init: needed for {concept.word}; give a known word for each new one"
            )
        start_of(init, args.vectors, loaded)
    make_output_dir(args.output_dir)
    refuse_other_words(args.output_dir / "words.safetensors", concepts)
    seconds = 3 * args.steps * len(concepts) * seconds_of_a_call(loaded, args.batch_size)
    print_estimate("training", seconds, loaded)
    latents = [encode_folder(folder, loaded, args.flip) for folder in folders]
    loaded.net.save_memory()

    words = {}
    for concept, kind, init, encoded in zip(concepts, kinds, inits, latents, strict=True):
        print(f"{concept.word}: a new {kind}, starts from {init!r}")
        try:
            words[concept.word] = learn(args, concept, kind, init, encoded, loaded)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch-size {args.batch_size}: too little memory; choose a smaller one"
            ) from None
    save_words(args.output_dir / "words.safetensors", words)
    peak = peak_memory(loaded.device) / 2**10
    print(f"{args.output_dir / 'words.safetensors'}: {', '.join(words)} (peak {peak:.1f} GiB)")


def refuse_other_words(file: Path, concepts: Sequence[Concept]) -> None:
    """Raise UserError if the file has words that this training would drop."""
    if not file.exists():
        return
    others = set(read_words(file, "--output-dir")) - {concept.word for concept in concepts}
    if others:
        raise UserError(
            f"--output-dir {file.parent}: holds other words ({', '.join(sorted(others))}); "
            "choose another folder"
        )


def what_to_learn(args: Train) -> tuple[list[Concept], list[Path]]:
    """The concepts, and the folder of each one's images."""
    if args.input_json is None:
        assert args.images is not None
        concept = Concept("word", "", args.token, (args.token,), (), ())
        return [concept], [args.images]
    concepts = read_concepts(args.input_json)
    root = args.images or args.input_json.parent
    return concepts, [root / concept.name for concept in concepts]


def one_each(flag: str, values: Sequence[Any], concepts: Sequence[Concept]) -> list[Any]:
    """The values of an option, one for each concept. Raises UserError for another number."""
    if len(values) != len(concepts):
        given = " ".join(map(str, values))
        words = ", ".join(concept.word for concept in concepts)
        raise UserError(f"{flag} {given}: needs one value for each of {words}")
    return list(values)


def guessed_inits(concepts: Sequence[Concept], loaded: Loaded) -> list[str]:
    """What each word starts from if --init says nothing; "" if that cannot be known.

    For an object src_image, for a style a style that the model knows.
    """
    style = STYLES[loaded.which]
    return [concept.source if concept.kind == "object" else style for concept in concepts]


class Job(NamedTuple):
    """A prompt of which images are missing."""

    prompt: str
    folder: Path
    stem: str
    """What the names of its files begin with."""
    missing: list[int]

    def path(self, number: int) -> Path:
        """The file of an image."""
        return self.folder / f"{self.stem}{number}.png"


def generate(args: Generate) -> None:
    """Draw the images that are not there yet; processes share the batches."""
    concepts = read_concepts(args.input_json)
    accelerator = make_accelerator(args.device, "fp32")
    loaded = load_model(args.model, args.device, args.precision)
    words = find_words(args, concepts, loaded)
    sampling = Sampling(args.steps, default_guidance(args.guidance, loaded), args.solver)
    jobs = prepare_folders(args, concepts, words, sampling, accelerator)
    missing = sum(len(job.missing) for job in jobs)
    if not missing:
        if accelerator.is_main_process:
            print(f"{args.output_dir}: already finished, nothing to do")
        return
    batch_size = args.batch_size or default_batch_size(loaded)
    if accelerator.is_main_process:
        print(
            f"{missing:,} images of {len(jobs)} prompts, {args.steps} steps, {batch_size} at a time"
        )
        seconds = missing * args.steps * seconds_of_a_call(loaded, 2 * batch_size) / batch_size
        print_estimate("sampling", seconds / accelerator.num_processes, loaded)

    started = time.monotonic()
    tokenizer = Tokenizer(loaded.net.length, {word: len(rows) for word, rows in words.items()})
    for job in jobs:
        if tokenizer.is_too_long(job.prompt) and accelerator.is_main_process:
            print(f"warning: the end of {job.prompt[:60]!r}… is cut off: it has too many tokens")
    draw_missing(args, jobs, words, tokenizer, loaded, sampling, batch_size, accelerator)
    accelerator.wait_for_everyone()
    seconds = (time.monotonic() - started) / missing
    peak = peak_memory(loaded.device) / 2**10
    if accelerator.is_main_process:
        print(
            f"{missing:,} images: {args.output_dir} "
            f"({seconds:.1f} s an image, peak memory {peak:.1f} GiB)"
        )


def draw_missing(
    args: Generate,
    jobs: Sequence[Job],
    words: dict[str, Tensor],
    tokenizer: Tokenizer,
    loaded: Loaded,
    sampling: Sampling,
    batch_size: int,
    accelerator: Accelerator,
) -> None:
    """Draw this process's share of the missing images, fewer at a time where memory is short."""
    rows = torch.cat(list(words.values())).to(loaded.device)
    empty = encode_prompts(loaded, tokenizer, [""], rows)
    batches = []
    for job in jobs:
        starts = range(0, len(job.missing), batch_size)
        batches += [(job, job.missing[first : first + batch_size]) for first in starts]
    mine = my_share(batches, accelerator)
    for job, numbers in show_progress(mine, len(mine), "images, batches"):
        states = encode_prompts(loaded, tokenizer, [job.prompt], rows)
        first = 0
        while first < len(numbers):
            some = numbers[first : first + batch_size]
            several = states.expand(len(some), -1, -1)
            try:
                images = sample(
                    loaded.net, loaded.schedule, several, empty, args.seed, some, sampling
                )
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise UserError(
                        f"--device {args.device}: too little memory for one image"
                    ) from None
                batch_size = batch_size // 2
                torch.cuda.empty_cache()
                continue
            for number, image in zip(some, to_uint8(images), strict=True):
                save_image(image, job.path(number))
            first += len(some)


def default_guidance(given: float | None, loaded: Loaded) -> float:
    """The guidance scale: as given, or 7.5 for Stable Diffusion and 3 for the small model."""
    if given is not None:
        return given
    return 7.5 if loaded.which == "stable-diffusion" else 3.0


def default_batch_size(loaded: Loaded) -> int:
    """How many images are computed at a time, if the user does not say."""
    if loaded.which == "small":
        return 25
    return 1 if loaded.device.type == "cpu" else 5


def find_words(args: Generate, concepts: Sequence[Concept], loaded: Loaded) -> dict[str, Tensor]:
    """The vectors of all learned words that the prompts have.

    Raises UserError that says how to train them if a word is in no file.
    """
    files = list(args.embeddings)
    if not files:
        name = WORDS_FILES[loaded.which]
        places = [args.model.parent / name, SMALL_MODEL.parent / name]
        files = [place for place in places if place.is_file()][:1]
    found: dict[str, Tensor] = {}
    for file in files:
        for word, rows in read_words(file).items():
            if rows.shape[1] != loaded.net.text_width:
                raise UserError(
                    f"--embeddings {file}: {word} has {rows.shape[1]} numbers, "
                    f"but the model's words have {loaded.net.text_width}"
                )
            found[word] = rows
    for concept in concepts:
        if concept.word not in found:
            raise UserError(how_to_learn(args, concepts, concept.word, loaded))
    return found


def how_to_learn(args: Generate, concepts: Sequence[Concept], word: str, loaded: Loaded) -> str:
    """One line: the command that learns the words, and how long it takes here."""
    defaults = Train(input_json=args.input_json, output_dir=Path("runs/p3/words"))
    calls = 3 * defaults.steps * len(concepts)
    seconds = calls * seconds_of_a_call(loaded, defaults.batch_size)
    command = [
        *("python", "p3_textual_inversion.py", "train", str(args.input_json)),
        *("--model", str(args.model), "--output-dir", str(defaults.output_dir)),
        *("--init", *[init or "WORD" for init in guessed_inits(concepts, loaded)]),
    ]
    return (
        f"{args.input_json}: no embedding of {word} is known; learn it with: {shlex.join(command)} "
        f"(about {tqdm.format_interval(seconds)} on {loaded.device.type}), and then put "
        f"{defaults.output_dir}/words.safetensors at checkpoints/{WORDS_FILES[loaded.which]}"
    )


def prepare_folders(
    args: Generate,
    concepts: Sequence[Concept],
    words: dict[str, Tensor],
    sampling: Sampling,
    accelerator: Accelerator,
) -> list[Job]:
    """Make the folders; returns the prompts of which images are missing.

    Raises UserError if a folder holds other files, or images of other settings.
    """
    make_output_dir(args.output_dir, "OUT")
    settings = {
        **asdict(sampling),
        "seed": args.seed,
        "model": [args.model.name, args.model.stat().st_size],
        "prompts": {concept.name: list(concept.prompts) for concept in concepts},
        "words": {word: digest_of(rows) for word, rows in sorted(words.items())},
    }
    file = args.output_dir / "generated.json"
    if file.exists() and read_settings(file) != json.loads(json.dumps(settings)):
        raise UserError(f"OUT {args.output_dir}: holds images of other settings; remove it first")
    jobs = []
    for concept in concepts:
        for number, prompt in enumerate(concept.prompts):
            folder = args.output_dir / concept.name / str(number)
            stem = f"source{concept.name}_prompt{number}_"
            names = [f"{stem}{k}.png" for k in range(args.count)]
            make_output_dir(folder, "OUT", only=names)
            missing = [k for k, name in enumerate(names) if not (folder / name).exists()]
            if len(missing) < args.count and not file.exists():
                raise UserError(f"OUT {folder}: holds images of unknown settings; remove it first")
            if missing:
                jobs.append(Job(prompt, folder, stem, missing))
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if accelerator.is_main_process:
        atomic_write(file, json.dumps(settings, indent=1) + "\n")
    accelerator.wait_for_everyone()  # no image is there before its settings
    return jobs


def read_settings(file: Path) -> Any:
    """The settings of the images that are there; None if the file is damaged."""
    try:
        return read_json(file)
    except UserError:
        return None


def digest_of(rows: Tensor) -> str:
    """A short hash of the vectors of a word."""
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]


@torch.inference_mode()
def seconds_of_a_call(loaded: Loaded, batch_size: int) -> float:
    """How long the U-Net takes for a batch. The first call is slower; the second one counts."""
    net = loaded.net
    x = torch.randn(batch_size, *net.shape, device=loaded.device)
    t = torch.full((batch_size,), 500, device=loaded.device)
    states = torch.randn(batch_size, net.length, net.text_width, device=loaded.device)
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        net.predict(x, t, states).sum().item()
        seconds = time.monotonic() - started
        if seconds > SLOW:
            break
    return seconds


def print_estimate(what: str, seconds: float, loaded: Loaded) -> None:
    """Print how long something will take, and what the networks take of the memory."""
    size = sum(value.nbytes for value in loaded.net.parameters()) / 2**30
    print(
        f"{what}: about {tqdm.format_interval(seconds)} on {loaded.device.type}; "
        f"the networks take {size:.1f} GiB of memory"
    )


def main(args: Train | Generate | TrainModel) -> Any:
    """Run one command."""
    match args:
        case Train():
            return train(args)
        case Generate():
            return generate(args)
        case TrainModel():
            return train_model(args)


if __name__ == "__main__":
    run_cli(Train | Generate | TrainModel, main, shared=Train | Generate | TrainModel)

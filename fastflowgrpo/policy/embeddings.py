"""A cache of prompt embeddings, in memory and on disk."""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fastflowgrpo.console import progress
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.protocol import Conditioning, Policy
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.images import image_key

BATCH = 32  # prompts encoded at once for the folder
CACHED_PROMPTS = 512  # kept in memory
_Key = tuple[str, Path | bytes | None]  # a prompt's text and source image
ABANDONED_SECONDS = 86400.0  # since an unfinished file was written last


class EmbeddingCache:
    """Encodes each distinct prompt once and keeps the last ones in memory, or all of them in a folder.

    A prompt with a source image has the encoded image in its embedding too.

    Runs and processes may share the folder: a file's name is a hash of its prompt and of `Policy.encoder_key`, and a
    file gets its name only when it is complete.

    Args:
        policy: encodes the prompts.
        folder: of the embeddings on disk, which `prepare` writes; None keeps embeddings in memory only.
        size: number of prompts kept in memory; a prompt of SD3 with T5 takes 2.7 MB in bfloat16.
        shape: of one latent sample, the size at which source images are encoded; not needed without them.
    """

    def __init__(
        self,
        policy: Policy,
        folder: str | Path | None = None,
        size: int = CACHED_PROMPTS,
        shape: tuple[int, ...] = (),
    ):
        self.policy, self.size, self.shape = policy, size, shape
        self.folder = None if folder is None else Path(folder)
        self.key = "" if folder is None else policy.encoder_key()
        self.rows: OrderedDict[_Key, Conditioning] = OrderedDict()

    def prepare(self, prompts: Iterable[str | Prompt]) -> None:
        """Write the embeddings of all prompts of a run into the folder, then free the encoders.

        Raises:
            UserError: the folder cannot be written.
        """
        self.write(prompts)
        self.policy.drop_encoders()

    def write(self, prompts: Iterable[str | Prompt]) -> None:
        """Write the embeddings that the folder does not have yet.

        Raises:
            UserError: the folder cannot be written.
        """
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            missing = [prompt for prompt in dict.fromkeys(map(_key, prompts)) if not self._has(prompt)]
            with self.policy.encoding() if missing else nullcontext():
                for begin in progress("encoding prompts", range(0, len(missing), BATCH)):
                    batch = missing[begin : begin + BATCH]
                    for prompt, row in zip(batch, self._encode(batch), strict=True):
                        path = self._path(prompt)
                        unfinished = path.with_suffix(f".{uuid4().hex}")
                        save_file(row, unfinished)
                        unfinished.replace(path)
            if missing:
                self._remove_abandoned(self._path(missing[-1]).stat().st_mtime)
        except OSError as error:
            raise UserError(f"policy.embeddings_dir {self.folder} cannot be written: {error}") from error

    def _remove_abandoned(self, now: float) -> None:
        """Delete the files that other processes began a day before `now` (in the disk's time): they were killed."""
        assert self.folder is not None
        for path in self.folder.iterdir():
            if re.fullmatch(r"\.[0-9a-f]{32}", path.suffix):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < now - ABANDONED_SECONDS:
                        path.unlink()

    def __call__(self, prompts: Sequence[str | Prompt]) -> Conditioning:
        """Return embeddings with one row per prompt, from memory, the folder or, without a folder, the encoders.

        Raises:
            UserError: a file in the folder is missing or damaged.
        """
        distinct = dict.fromkeys(map(_key, prompts))
        missing = [prompt for prompt in distinct if prompt not in self.rows]
        with self.policy.encoding() if missing and not self.folder else nullcontext():
            for prompt in missing:
                # One prompt at a time: its bits can depend on the batch, and a resumed run has other batches.
                self.rows[prompt] = self._read(prompt) if self.folder else self._encode([prompt])[0]
        for prompt in distinct:
            self.rows.move_to_end(prompt)
        rows = [self.rows[_key(prompt)] for prompt in prompts]
        while len(self.rows) > self.size:
            self.rows.popitem(last=False)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _encode(self, prompts: list[_Key]) -> list[Conditioning]:
        encoded = self.policy.encode([text for text, _ in prompts])
        # clone: a view would keep the whole batch alive
        rows = [{name: tensor[i].clone() for name, tensor in encoded.items()} for i in range(len(prompts))]
        for row, (_, image) in zip(rows, prompts, strict=True):
            if image is not None:
                row |= {name: tensor[0] for name, tensor in self.policy.encode_source(image, self.shape).items()}
        return rows

    def _read(self, prompt: _Key) -> Conditioning:
        try:
            return load_file(self._path(prompt), device=str(self.policy.device))
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(
                f"policy.embeddings_dir: an embedding is missing or damaged, start the run again to make it ({error})"
            ) from error

    def _path(self, prompt: _Key) -> Path:
        assert self.folder is not None
        text, image = prompt
        source = "" if image is None else f"\n{self.shape} {image_key(image)}"
        return self.folder / (hashlib.sha256(f"{self.key} {text}{source}".encode()).hexdigest() + ".safetensors")

    def _has(self, prompt: _Key) -> bool:
        """Return whether the folder has the prompt's complete file."""
        try:
            with safe_open(self._path(prompt), "pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False


def _key(prompt: str | Prompt) -> _Key:
    return (prompt, None) if isinstance(prompt, str) else (prompt.text, prompt.image)


def check_source_images(policy: Policy, prompts: Iterable[Prompt]) -> None:
    """Check that prompts have source images if, and only if, the policy edits images.

    Raises:
        UserError: one does not; names it.
    """
    for prompt in prompts:
        if policy.edits_images and prompt.image is None:
            raise UserError(
                f"the model edits images, but the prompt {prompt.text!r} has none: give prompts as a .jsonl with the "
                'key "image" or as a folder of NAME.png and NAME.txt'
            )
        if prompt.image is not None and not policy.edits_images:
            raise UserError(
                f"the prompt {prompt.text!r} has a source image, but the model makes images from text alone: take an "
                "editing model (docs/editing.md) or prompts without `image`"
            )

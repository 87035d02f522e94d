"""Prompt embeddings, computed once per distinct prompt."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fastflowgrpo.console import progress
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy import Conditioning, Policy

BATCH = 32  # prompts encoded at once for the disk


class EmbeddingCache:
    """`Policy.encode` with a memory of the prompts that were asked for last, and of all prompts in a folder if given.

    The folder may be shared by runs and processes: a file's name is a hash of its prompt and of `Policy.encoder_key`,
    and it is complete as soon as it has its name.

    Args:
        policy: what encodes.
        folder: of the embeddings on disk; None keeps them in memory alone. They are written by `prepare`.
        size: prompts kept in memory; one of SD3 with T5 takes 2.7 MB in bfloat16.
    """

    def __init__(self, policy: Policy, folder: str | Path | None = None, size: int = 512):
        self.policy, self.size = policy, size
        self.folder = None if folder is None else Path(folder)
        self.key = "" if folder is None else policy.encoder_key()
        self.rows: OrderedDict[str, Conditioning] = OrderedDict()

    def prepare(self, prompts: Iterable[str]) -> None:
        """`write` the prompts, all that will be asked for, then free the encoders."""
        self.write(prompts)
        self.policy.drop_encoders()

    def write(self, prompts: Iterable[str]) -> None:
        """Encode into the folder what it lacks of the prompts.

        Raises:
            UserError: the folder cannot be written.
        """
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            missing = [prompt for prompt in dict.fromkeys(prompts) if not self._has(prompt)]
            for begin in progress("encoding prompts", range(0, len(missing), BATCH)):
                part = missing[begin : begin + BATCH]
                for prompt, row in zip(part, self._encode(part), strict=True):
                    path = self._path(prompt)
                    unfinished = path.with_suffix(f".{uuid4().hex}")
                    save_file(row, unfinished)
                    unfinished.replace(path)
        except OSError as error:
            raise UserError(f"policy.embeddings_dir {self.folder} cannot be written: {error}") from error

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Embeddings with a row per prompt; what is neither in memory nor on disk is encoded.

        Raises:
            RuntimeError: a file of the folder has gone since `prepare`.
        """
        distinct = dict.fromkeys(prompts)
        for prompt in distinct:
            if prompt not in self.rows:
                # Each alone: its bits can depend on the batch, and a resumed run asks for other batches.
                self.rows[prompt] = self._read(prompt) if self.folder else self._encode([prompt])[0]
        for prompt in distinct:
            self.rows.move_to_end(prompt)
        rows = [self.rows[prompt] for prompt in prompts]
        while len(self.rows) > self.size:
            self.rows.popitem(last=False)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        encoded = self.policy.encode(prompts)
        # clone: a view would keep the whole batch alive
        return [{name: tensor[i].clone() for name, tensor in encoded.items()} for i in range(len(prompts))]

    def _read(self, prompt: str) -> Conditioning:
        try:
            return load_file(self._path(prompt), device=str(self.policy.device))
        except (FileNotFoundError, SafetensorError) as error:
            raise RuntimeError(f"policy.embeddings_dir: an embedding has gone or is damaged ({error})") from error

    def _path(self, prompt: str) -> Path:
        assert self.folder is not None
        return self.folder / (hashlib.sha256(f"{self.key} {prompt}".encode()).hexdigest() + ".safetensors")

    def _has(self, prompt: str) -> bool:
        """Whether the folder has the prompt's file, whole."""
        try:
            with safe_open(self._path(prompt), "pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

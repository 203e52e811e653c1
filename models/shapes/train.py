"""Make every weight of the shipped model from a seed: `python -m safelight.models.shapes.train --work DIR`.

Runs the stages in order, each resumable; knows their order and nothing of their insides. The result is an
ordinary diffusers folder (float16 safetensors) with the one-step student beside the UNet, and the oracle in a
folder of its own.
"""

import argparse
import itertools
import os
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from safelight.models.shapes import MODEL_FOLDER, ORACLE_FILE
from safelight.models.shapes.captions import stream
from safelight.models.shapes.stages.autoencoder import encode_all, train_autoencoder
from safelight.models.shapes.stages.checker import build_processor, checker_input, train_checker
from safelight.models.shapes.stages.curves import plot_curves
from safelight.models.shapes.stages.diffusion import build_scheduler, train_diffusion
from safelight.models.shapes.stages.oracle import Oracle, train_oracle
from safelight.models.shapes.stages.pictures import Pictures
from safelight.models.shapes.stages.sampling import Generators
from safelight.models.shapes.stages.student import train_student
from safelight.models.shapes.stages.text import open_tokenizer, train_text
from safelight.models.shapes.stages.thresholds import set_thresholds

TUNING = 1500  # generated pictures, with 1 step and with 25, on which the thresholds are set


def train(work: Path, out: Path, oracle_file: Path, count: int) -> None:
    """Run all stages and write the model folder."""
    work.mkdir(parents=True, exist_ok=True)
    pictures = Pictures.make(work, "train", count, seed=0)
    oracle = train_oracle(work, pictures)
    autoencoder = train_autoencoder(work, pictures)
    checker = train_checker(work, pictures)
    latents = encode_all(work, autoencoder, pictures) * autoencoder.config.scaling_factor
    tokenizer = open_tokenizer(work, pictures.captions)
    text_encoder = train_text(work, tokenizer, pictures)
    unet, text_encoder = train_diffusion(work, pictures, latents, tokenizer, text_encoder)
    student = train_student(work, unet, text_encoder, tokenizer, pictures)
    generators = Generators(tokenizer, text_encoder, unet, student, autoencoder, build_scheduler())
    tuning = list(itertools.islice(stream("tune", 7, held_out=False), TUNING))
    captions = [item.caption for item in tuning]
    made = torch.cat([generators.pictures(captions, 7, steps=steps) for steps in (1, 25)])
    unsafe = torch.tensor([item.scene.restricted for item in tuning] * 2)
    set_thresholds(work, checker, checker_input(made, build_processor()), unsafe)
    write(out, oracle_file, generators, checker, oracle)
    plot_curves(work, out.parent / "curves.png")


def write(out: Path, oracle_file: Path, made: Generators, checker: torch.nn.Module, oracle: Oracle) -> None:
    """Save the diffusers folder, the student and the oracle as float16 safetensors."""
    pipeline = StableDiffusionPipeline(
        vae=made.autoencoder,
        text_encoder=made.text_encoder,
        tokenizer=made.tokenizer,
        unet=made.unet,
        scheduler=made.scheduler,
        safety_checker=checker,
        feature_extractor=build_processor(),
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(out, safe_serialization=True)
    made.student.half().save_pretrained(out / "unet_one_step")
    # vocab.json and merges.txt, which readers of CLIP's format expect
    made.tokenizer._tokenizer.model.save(str(out / "tokenizer"))
    oracle_file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half() for key, value in oracle.state_dict().items()}, oracle_file)


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(prog="safelight.models.shapes.train", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("out/shapes"), help="checkpoints, curves and finished stages"
    )
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="where the model folder is written")
    parser.add_argument("--oracle", type=Path, default=ORACLE_FILE, help="where the oracle is written")
    parser.add_argument("--pictures", type=int, default=40_000, help="how many pictures to draw")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.work, arguments.out, arguments.oracle, arguments.pictures)


if __name__ == "__main__":
    main()

"""What a training step of each method costs.

    python -m tools.benchmark --batch-size 16 --steps 8
"""

import argparse
import time
from statistics import median

import torch
from tqdm import tqdm

import train
from osc_qat import OscillationTracker
from tools.common import tool_parser


def benchmark(args: argparse.Namespace) -> None:
    """Prints the median time of a step of each method, from random weights.

    The methods take turns within one process, so that a busy moment hits all of them.
    """
    runs, times = {}, {method: [] for method in train.METHODS}
    for method in train.METHODS:
        flags = [f"--method={method}", f"--model={args.model}", f"--image-size={args.image_size}",
                 f"--batch-size={args.batch_size}", f"--device={args.device}", "--bn-batches=1",
                 "--lr=0.001", *["--amp"] * args.amp, *["--compile"] * args.compile]
        run = runs[method] = train.Run(train.parse(flags), score_float=False)
        run.total, run.step = 10**6, 5 * 10**5  # halfway: dampening and freezing are on
        run.wrapped_model.train()
    # Plain LSQ needs no tracker; counting oscillations belongs to the cost of the cures.
    runs["lsq"].tracker = OscillationTracker(runs["lsq"].model, max_bits=0)
    images, labels = next(run.epoch_batches(0))
    for _ in tqdm(range(args.steps + 2), "benchmark", disable=None):
        for method, run in runs.items():
            begun = time.perf_counter()
            train.train_step(run, images, labels)  # it reads the loss, so a GPU has finished
            times[method].append(1000 * (time.perf_counter() - begun))
    medians = {method: median(each[2:]) for method, each in times.items()}  # 2 to warm up
    cuda = run.device.type == "cuda"
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")
    train.print_table([
        {"method": method, "step ms": each, "/ FP32": each / medians["fp32"],
         "/ LSQ": each / medians["lsq"], "first step s": times[method][0] / 1000}
        for method, each in medians.items()])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line; the default sizes depend on the network."""
    p = tool_parser("benchmark", "Prints the time of a training step of each method.",
                    "--model mobilenet_v2 --batch-size 16 --steps 8")
    add = p.add_argument
    add("--model", choices=tuple(train.NETWORKS), default="mobilenet_v2", metavar="NAME",
        help=f"network: {', '.join(train.NETWORKS)}")
    add("--image-size", type=train.within(16, 2048), metavar="PIXELS",
        help="width and height of the images [224; 20 for a short network]")
    add("--batch-size", type=train.within(2, 65536), metavar="N",
        help="images per step [128; 64 for a short network]")
    add("--steps", type=train.within(1, 10**9), default=10, metavar="N",
        help="steps of each method, after two to warm up")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to compute on")
    add("--amp", action="store_true", help="use bfloat16 autocast")
    add("--compile", action="store_true", help="use torch.compile")
    args = p.parse_args(argv)
    sizes = train.SHORT if train.is_short(args.model) else train.IMAGENET
    args.image_size = args.image_size or sizes["image_size"]
    args.batch_size = args.batch_size or sizes["batch_size"]
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on standard error."""
    return train.exit_status("python -m tools.benchmark", parse, benchmark, argv)


if __name__ == "__main__":
    train.run_script(main)

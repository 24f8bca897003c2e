"""Class and probability of pictures, by a file of tools/export.py; copy this file where you like.

    python predict.py net.onnx photo.jpg ...

It needs onnxruntime, numpy and Pillow, and neither torch nor any other file of ours. A picture is
read exactly as in training (read_picture and picture_transform of train.py).
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_picture(path: str) -> Image.Image:
    """An RGB picture: turned as its EXIF data say, transparency on white, 16 bit brought to 8."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "F":
        raise OSError("holds floats of an unknown range")
    if image.mode.startswith("I"):  # PIL would clip it to white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture, with black around it where it is smaller."""
    left, top = (max(0, wanted - side) // 2 for wanted, side in zip((width, height), image.size))
    padded = Image.new("RGB", (max(width, image.width), max(height, image.height)))
    padded.paste(image, (left, top))
    left, top = (round((side - wanted) / 2) for wanted, side in zip((width, height), padded.size))
    return padded.crop((left, top, left + width, top + height))


def network_input(image: Image.Image, facts: dict) -> np.ndarray:
    """A picture as the network's input, (1, 3, size, size)."""
    longest = 8 * min(image.size)  # a strip's ends are not seen, and would be resized in vain
    image = center_crop(image, *(min(side, longest) for side in image.size))
    short = min(image.size)
    shape = [int(facts["resize"] * side / short) for side in image.size]
    image = image.resize(shape, Image.Resampling[facts["interpolation"].upper()])
    image = center_crop(image, facts["image_size"], facts["image_size"])
    pixels = np.asarray(image, np.float32) / 255
    mean, std = (np.asarray(facts[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None])


def main(argv: list[str]) -> int:
    """Prints a line for each picture; exit status 2 if there is one that cannot be read."""
    if len(argv) < 2 or argv[0] in ("-h", "--help"):
        print("usage: python predict.py NET.onnx PICTURE...", file=sys.stderr)
        return 2
    file, *pictures = argv
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        facts = {key: json.loads(metadata[key]) for key in
                 ("classes", "image_size", "resize", "mean", "std", "interpolation")}
    except Exception as error:  # onnxruntime's own kinds
        print(f"{file}: is not a file of tools/export.py that onnxruntime "
              f"{onnxruntime.__version__} can load ({str(error).splitlines()[0]:.160})",
              file=sys.stderr)
        return 2
    status = 0
    for path in pictures:
        try:
            image = network_input(read_picture(path), facts)
        except Exception as error:  # a damaged file can raise any
            print(f"{path}: is not a readable picture ({error})", file=sys.stderr)
            status = 2
            continue
        logits = session.run(None, {"images": image})[0][0]
        shares = np.exp(logits - logits.max())
        best = logits.argmax()
        print(f"{path}: {facts['classes'][best]} {shares[best] / shares.sum():.3f}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

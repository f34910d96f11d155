"""A network and an image for the C example, and the line that it has to print."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import repvgg

folder = Path(sys.argv[1])
torch.manual_seed(0)
network = repvgg.reparameterize(repvgg.create_model("repvgg_a0", num_classes=5).eval())
network.set_class_names(["ant", "bee", "cat", "dog", "eel"])
repvgg.compile(network, tune=None).save(folder / "net.rvgg")
pixels = np.random.default_rng(0).integers(0, 256, (75, 64, 3), dtype=np.uint8)
Image.fromarray(pixels).save(folder / "image.ppm")
pre = network.preprocessing
images = (torch.from_numpy(pixels) / 255.0 - torch.tensor(pre.mean)) / torch.tensor(pre.std)
with torch.inference_mode():
    logits = network(images.permute(2, 0, 1)[None])[0]
best = int(logits.argmax())
print(f"{best} {network.class_names[best]} {logits[best]:.4f}")

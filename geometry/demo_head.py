# SPDX-License-Identifier: Apache-2.0
"""The embedded head under the names that published command lines use: python -m geometry.demo_head --out DIR."""

import argparse
from pathlib import Path

from dnnlib import atomic_write
from geometry.head_model import DEFAULT_HEAD, load_embedded_head
from geometry.meshes import ObjMesh, write_landmarks, write_obj

# The mean person, awake and friendly: lips a little apart, a light smile, brows slightly raised.
EXPRESSION = {
    'jawOpen': 0.06, 'mouthSmileLeft': 0.35, 'mouthSmileRight': 0.35, 'cheekSquintLeft': 0.15, 'cheekSquintRight': 0.15,
    'browInnerUp': 0.1,
}  # fmt: skip
TEMPLATE_FILES = ('head_template.obj', 'uv_face_mask.png')


def write_demo_files(folder: Path) -> None:
    """Write head_template.obj, uv_face_mask.png, demo.obj and demo_kpt2d.txt into `folder`, made where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEMPLATE_FILES:
        with atomic_write(folder / name) as file:
            file.write((DEFAULT_HEAD.parent / name).read_bytes())
    model = load_embedded_head().double()  # The order of sums must not show in the files' digits.
    head = model(model.uvs.new_zeros(1, model.num_identity), model.expression(EXPRESSION))
    surface = (x.numpy() for x in (model.uvs, model.faces, model.uv_faces))
    write_obj(folder / 'demo.obj', ObjMesh(head.vertices[0].numpy(), *surface))
    write_landmarks(folder / 'demo_kpt2d.txt', head.landmarks[0].numpy())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog='python -m geometry.demo_head', description='Write the demo head.')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder for the four files')
    write_demo_files(parser.parse_args(arguments).out)


if __name__ == '__main__':
    main()

# SPDX-License-Identifier: Apache-2.0
"""Expression labels of training, dataset_exp.json: 50 numbers a picture, of DECA's codes or of ARKit-named ones."""

import json
import pathlib
import zipfile

import numpy as np

from dataset_preprocessing.ffhq.files import PreprocessError
from geometry.head_model import ARKIT_NAMES
from training.config import EXPRESSION_LENGTH

# A label has two numbers less than ARKit has names: movements of opposite directions share one, left minus right.
OPPOSITES = {'jawLeft': 'jawRight', 'mouthLeft': 'mouthRight'}
ARKIT_LABEL_NAMES = tuple(name for name in ARKIT_NAMES if name not in OPPOSITES.values())
DAMAGE = (ValueError, TypeError, LookupError, OSError, EOFError, AttributeError, zipfile.BadZipFile)


def read_code(path: pathlib.Path) -> np.ndarray:
    """Return DECA's expression [50] of a file of codes; PreprocessError for another file."""
    try:
        with np.load(path, allow_pickle=False) as content:
            code = np.asarray(content['exp'], dtype=np.float64).ravel()
    except DAMAGE as error:
        raise PreprocessError(f'{path}: expected codes of DECA with exp, found others') from error
    if code.shape != (EXPRESSION_LENGTH,) or not np.isfinite(code).all():
        raise PreprocessError(f'{path}: expected exp of {EXPRESSION_LENGTH} finite numbers, found others')
    return code


def read_coefficients(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return expression labels [50] by picture of a coefficients.npz with ARKit's 52 names; else PreprocessError."""
    try:
        with np.load(path, allow_pickle=False) as content:
            pictures, names = content['names'].tolist(), content['expression_names'].tolist()
            values = np.asarray(content['expression'], dtype=np.float64)
    except DAMAGE as error:
        raise PreprocessError(f'{path}: expected names, expression_names and expression, found others') from error
    if sorted(names) != sorted(ARKIT_NAMES) or values.shape != (len(pictures), len(names)):
        raise PreprocessError(f"{path}: expected {len(ARKIT_NAMES)} expressions of ARKit's names, found others")
    if not np.isfinite(values).all():
        raise PreprocessError(f'{path}: expected finite numbers, found others')
    column = dict(zip(names, values.T, strict=True))
    parts = [column[name] - column.get(OPPOSITES.get(name), 0) for name in ARKIT_LABEL_NAMES]
    return dict(zip(pictures, np.stack(parts, axis=1), strict=True))


def labels_text(codes: dict[str, np.ndarray]) -> str:
    """Return a dataset_exp.json of expression labels [50] by picture."""
    return json.dumps({'labels': [[name, code.tolist()] for name, code in codes.items()]})

# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole tree: layout, direction of imports, help texts, and the README's commands and code."""

import ast
import importlib
import re
import shlex
import subprocess

import pytest
from click.testing import CliRunner
from parity import ROOT

SCRIPTS = [
    'calc_metrics', 'convert_network', 'gen_samples', 'gen_sheets', 'gen_videos_next3d', 'reenact_avatar_next3d',
    'train_next3d', 'viewer',
    'dataset_preprocessing.pack', 'dataset_preprocessing.check_data',
    'dataset_preprocessing.synthetic.make_dataset', 'dataset_preprocessing.synthetic.make_clip',
    'dataset_preprocessing.synthetic.train_estimator',
    'dataset_preprocessing.ffhq.detect', 'dataset_preprocessing.ffhq.crop', 'dataset_preprocessing.ffhq.fit_cameras',
    'dataset_preprocessing.ffhq.labels', 'dataset_preprocessing.ffhq.fit_meshes',
    'dataset_preprocessing.ffhq.check_files', 'dataset_preprocessing.ffhq.fit_head',
    'dataset_preprocessing.ffhq.find_gaze', 'dataset_preprocessing.ffhq.write_items',
    'dataset_preprocessing.ffhq.preprocess_in_the_wild',
    'dataset_preprocessing.ffhq.runme', 'dataset_preprocessing.ffhq.write_expressions',
    'dataset_preprocessing.rebalance',
]
LISTED = subprocess.check_output(['git', 'ls-files', '*.py'], cwd=ROOT, text=True).split()
TRACKED = [path for path in LISTED if not path.startswith('tests/data/')]
SOURCES = [path for path in TRACKED if not path.startswith('tests/')]
MAX_FUNCTION_LINES, MAX_COLUMNS = 60, 120
# Who may import whom, of this project's packages.
LAYERS = {
    'dnnlib': set(),
    'torch_utils': {'dnnlib'},
    'geometry': {'torch_utils', 'dnnlib'},
    'training/volume': {'training/volume', 'torch_utils'},
    'training': {'training', 'training/volume', 'geometry', 'torch_utils', 'dnnlib'},
    'training/loop': {'training', 'training/volume', 'legacy', 'geometry', 'torch_utils', 'dnnlib'},
    'legacy': {'training', 'training/volume', 'torch_utils', 'dnnlib'},
    'metrics': {'geometry', 'torch_utils', 'dnnlib'},
    'cli': {'legacy', 'training', 'metrics', 'geometry', 'torch_utils', 'dnnlib'},
    'dataset_preprocessing': {'cli', 'training', 'metrics', 'geometry', 'torch_utils', 'dnnlib'},
    'measure': {'dataset_preprocessing', 'training', 'metrics', 'geometry', 'torch_utils', 'dnnlib'},
}


def package_of(module_or_path):
    parts = re.sub(r'\.py$', '', module_or_path).replace('.', '/').split('/')
    for depth in (2, 1):
        if '/'.join(parts[:depth]) in LAYERS:
            return '/'.join(parts[:depth])
    return None


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', [p for p in SOURCES if package_of(p)])
def test_imports_point_downwards(path):
    own = package_of(path)
    for module in imported_modules(ast.parse((ROOT / path).read_text())):
        used = package_of(module)
        is_script = any(f'{module}.'.startswith(f'{script}.') for script in SCRIPTS)
        assert not is_script, f'{path} imports the script {module}'
        assert used in (None, own) or used in LAYERS[own], f'{path} ({own}) imports {module} ({used})'


@pytest.mark.parametrize('path', TRACKED)
def test_files_keep_the_house_style(path):
    text = (ROOT / path).read_text()
    tree = ast.parse(text)
    assert text.startswith('# SPDX-License-Identifier: Apache-2.0\n'), path
    assert ast.get_docstring(tree), f'{path}: no module docstring'
    for number, line in enumerate(text.splitlines(), start=1):
        assert len(line) <= MAX_COLUMNS, f'{path}:{number} has {len(line)} columns'
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f'{path}:{node.lineno} {node.name} has {lines} lines'
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f'{path}:{node.lineno} bare except'


@pytest.mark.parametrize('path', SOURCES)
def test_public_functions_have_docstrings(path):
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            assert ast.get_docstring(node), f'{path}:{node.lineno} {node.name}'


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_is_what_docs_say(script):
    main = importlib.import_module(script).main
    path = script.replace('.', '/') + '.py'
    result = CliRunner(env={'COLUMNS': '120'}).invoke(main, ['--help'], prog_name=path, terminal_width=120)
    assert result.exit_code == 0
    document = ROOT / 'docs' / 'help' / f'{script.split(".")[-1]}.txt'
    assert result.output == document.read_text(), f'{document.name} is not what --help prints'


def readme_commands():
    text = (ROOT / 'README.md').read_text().replace('\\\n', ' ')
    makefile = (ROOT / 'Makefile').read_text().replace('\\\n', ' ').replace('$(RUN)', 'python')
    # Later variables are made of earlier ones.
    for name, value in reversed(re.findall(r'^(\w+) [:?]?= (.*)$', makefile, re.MULTILINE)):
        makefile = makefile.replace(f'$({name})', value)
    for line in (text + makefile).splitlines():
        match = re.match(r'\s+python ([\w/]+)\.py ?(.*)', line)
        if match and '--help' not in match[2]:
            yield match[1].replace('/', '.'), match[2]


def test_commands_in_readme_and_makefile_parse():
    commands = list(readme_commands())
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, arguments in commands:
        importlib.import_module(script).main.make_context(script, shlex.split(arguments))


def test_python_code_in_the_readme_runs():
    code = '\n'.join(re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL))
    code = code.replace("'data/demo", f"'{ROOT}/data/demo")
    names = {}
    exec(code, names)
    assert names['image'].shape == (1, 3, 256, 256)
    assert names['field']['sigma'].shape == (1, 1000, 1)
    assert names['picture'].shape == (1, 256, 256, 3)


def test_documents_link_to_files_that_exist():
    for document in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), ROOT / 'data' / 'README.md']:
        for target in re.findall(r'\]\(([^)#:]+)\)', document.read_text()):
            assert (document.parent / target).exists(), f'{document.name} links to {target}'

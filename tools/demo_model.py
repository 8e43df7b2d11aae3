"""Train and store the small models that come with the library.

    python tools/demo_model.py                          # cmlf/models/demo
    python tools/demo_model.py --events FOLDER          # cmlf/models/recordings, from scenes of ESC-10 recordings

Both have a frozen MiniLM, an audio encoder of width 8, and use the schedule that mines batches in its last third with fixed
BatchNorm (`one schedule, groups of 8, BatchNorm fixed` in nbs/appendix/comparisons.ipynb). Runs are stored in runs/demo_model,
so that an interrupted command resumes. With --esc FOLDER, recall on single recordings of ESC-10 is measured and written to the card.
"""
import argparse, os, re, shutil, tempfile
from pathlib import Path

import numpy as np

from cmlf.appendix.card import model_card
from cmlf.appendix.comparisons import WAYS, Point
from cmlf.appendix.hub import PACKAGED
from cmlf.appendix.recordings import read_credits
from cmlf.appendix.small import shrink
from cmlf.config import get_profile
from cmlf.core import log, write_text
from cmlf.encoders import DualEncoder
from cmlf.experiments import Experiment

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = {'dog': 'A dog barks.', 'rain': 'Rain falls.', 'sea_waves': 'Sea waves break on the shore.', 'crying_baby': 'A baby cries.',
             'clock_tick': 'A clock ticks.', 'sneezing': 'Somebody sneezes.', 'helicopter': 'A helicopter flies by.',
             'chainsaw': 'A chainsaw cuts wood.', 'rooster': 'A rooster crows.', 'crackling_fire': 'A fire crackles.'}

def trained(events, epochs, scenes):
    settings = dict(text_frozen='6', n_train=str(scenes), epochs=str(epochs)) | (dict(width='8') if events else {})
    exp = Experiment(get_profile('field' if events else 'mini', settings), ROOT/'runs'/'demo_model', events)
    spec = Point('3cmlf', 'scratch', True, changes=WAYS['one schedule, groups of 8, BatchNorm fixed']).spec(exp, 0)
    exp.train_all([spec])
    return exp.run(spec)

def on_recordings(model, folder, folds):
    "Share of single recordings whose kind is the nearest of ten sentences, and R-precision of each sentence, by kind."
    names = dict(zip((f'{i:03d}' for i in range(1, 11)), SENTENCES)) # the classes have numbers, in this order
    found = [(p, names[p.parent.name[:3]]) for p in sorted(Path(folder).glob('[0-9]* - */*.ogg')) if int(p.name[0]) in folds]
    kinds = np.array([k for _, k in found])
    S = model.encode_text(list(SENTENCES.values())) @ model.encode_audio([p for p, _ in found]).T
    right = np.array(list(SENTENCES))[S.argmax(0)] == kinds
    precision = {k: float(np.mean(kinds[np.argsort(-s)[:(kinds == k).sum()]] == k)) for k, s in zip(SENTENCES, S)}
    return len(found), float(right.mean()), precision

_LICENCE = """The recordings of ESC-10 that it was trained on are CC0 or CC BY, two of them CC Sampling+ (which excludes advertisements).
All of these allow new works made from them if the authors are named: `CREDITS.md` names them. No recording can be heard in the weights.
The weights themselves have the licence of the code, Apache-2.0."""

def add_credits(folder, out):
    "Name the recordings of the training folds in the folder of the model; an error if one has no credit."
    found = read_credits(folder)
    stems = sorted(p.stem for p in Path(folder).glob('[0-9]* - */*.ogg') if p.name[0] in '123')
    lines = [f'- {s}: {found[s]}' for s in stems]
    write_text(out/'CREDITS.md', f'# Recordings\n\nThe model was trained on scenes of these {len(lines)} recordings of ESC-10.\n\n' + '\n'.join(lines) + '\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--events', default='', help='folder of recordings in the layout of ESC-10: train on scenes of them')
    parser.add_argument('--esc', default=os.environ.get('CMLF_ESC_DIR', ''), help='folder of ESC-10, to measure recall on recordings')
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--scenes', type=int, default=3000)
    parser.add_argument('--run', default='', help='package this finished run')
    args = parser.parse_args()
    from cmlf.runs import Run
    run = Run(args.run) if args.run else trained(args.events, args.epochs, args.scenes)
    model, out = DualEncoder.from_pretrained(run.folder), PACKAGED/('recordings' if args.events else 'demo')
    model.card = model_card(run, f'The model {out.name!r} of cmlf', out.name)
    if args.esc:
        n, accuracy, precision = on_recordings(model, args.esc, (5,) if args.events else (1, 2, 3, 4, 5))
        kinds = ', '.join(f'{k.replace("_", " ")} {100 * p:.0f}' for k, p in sorted(precision.items(), key=lambda x: -x[1]))
        model.card = model.card.replace('## Licence', f'On {n} single recordings of ESC-10 ({"fold 5, which it was not trained on" if args.events else "real sounds; it has only heard synthesised ones"}), '
                                        f'the right one of ten sentences such as “A dog barks.” is the nearest for {100 * accuracy:.0f} % '
                                        f'(chance: 10 %). Share of right kinds among the first hits of each sentence, percent: {kinds}.\n\n## Licence')
    if args.events: model.card = re.sub(r'(?<=## Licence\n\n).*?(?=\n\n## Limits)', _LICENCE, model.card, flags=re.S)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(Path(tmp)/'whole')
        shutil.rmtree(out, ignore_errors=True)
        shrink(Path(tmp)/'whole', out)
    if args.events: add_credits(args.events, out)
    size = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())
    log(f'{out}: {size / 1e6:.1f} MB, {run.retrieval()}')

if __name__ == '__main__': main()

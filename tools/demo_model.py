"""Train and store the small models that come with the library, and measure them on recordings.

    python tools/demo_model.py                          # train cmlf/models/demo
    python tools/demo_model.py --events FOLDER          # train cmlf/models/recordings, from scenes of ESC-10 recordings
    python tools/demo_model.py measure --esc FOLDER     # both on single recordings of ESC-10 (about two minutes)

Both have a frozen MiniLM, an audio encoder of width 8, and use the schedule that mines batches in its last third with fixed
BatchNorm (`one schedule, groups of 8, BatchNorm fixed` in nbs/appendix/comparisons.ipynb). Runs are stored in runs/demo_model,
so that an interrupted command resumes. `measure` writes esc10.csv and a line of the card of each model; it also follows
training if --esc or CMLF_ESC_DIR is given. nbs/appendix/demo_models.ipynb shows what was measured.
"""
import argparse, datetime, os, re, shutil, sys, tempfile
from pathlib import Path

from cmlf.appendix.card import model_card
from cmlf.appendix.comparisons import WAYS, Point
from cmlf.appendix.demo_models import class_table, read_measured, score_folder, write_measured
from cmlf.appendix.hub import PACKAGED, packaged
from cmlf.appendix.recordings import read_credits
from cmlf.appendix.small import shrink
from cmlf.config import get_profile
from cmlf.core import CmlfError, log, write_text
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

def class_folders(folder):
    "Name of each class folder of ESC-10 -> its sentence; the classes have numbers, in the order of the sentences."
    found = sorted(p.name for p in Path(folder).glob('[0-9]* - *') if p.is_dir())
    if len(found) == len(SENTENCES): return dict(zip(found, SENTENCES.values()))
    raise CmlfError(f'{folder or "--esc"}: {len(found)} class folders such as "001 - Dog bark"; give a folder of ESC-10, which has {len(SENTENCES)}')

def measure(name, folder):
    "Cosines of all recordings and sentences, stored beside the weights, and a line about them in the card."
    about = f'python tools/demo_model.py measure --esc ESC-10, {datetime.date.today()}'
    path = write_measured(score_folder(PACKAGED/name, folder, class_folders(folder)), name, about)
    card = PACKAGED/name/'README.md'
    text = re.sub(r'On \d+ single recordings of ESC-10.*?\n\n', '', card.read_text(encoding='utf-8'))
    write_text(card, text.replace('## Licence', f'{card_line(name)}\n\n## Licence'))
    log(f'{path}: {card_line(name)}')

def card_line(name):
    "The share of recordings whose sentence is the nearest: all of them, or those of fold 5."
    scores, _ = read_measured(name)
    if name == 'recordings': scores = scores[scores.file.str.contains('/5-')]
    row = class_table(scores).iloc[-1]
    which = '(fold 5, which it was not trained on)' if name == 'recordings' else '(it has heard synthesised sounds only)'
    return (f'On {row.sounds} single recordings of ESC-10 {which}, the right one of ten sentences such as “A dog barks.” is the '
            f'nearest for {row.right:.0f} % (95 % interval {row.low:.0f} to {row.high:.0f}; chance: 10 %).')

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
    parser.add_argument('what', nargs='?', default='train', choices=['train', 'measure'])
    parser.add_argument('--events', default='', help='folder of recordings in the layout of ESC-10: train on scenes of them')
    parser.add_argument('--esc', default=os.environ.get('CMLF_ESC_DIR', ''), help='folder of ESC-10, to measure recall on recordings')
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--scenes', type=int, default=3000)
    parser.add_argument('--run', default='', help='package this finished run')
    args = parser.parse_args()
    if args.what == 'measure':
        for name in packaged(): measure(name, args.esc)
        return
    from cmlf.runs import Run
    run = Run(args.run) if args.run else trained(args.events, args.epochs, args.scenes)
    model, out = DualEncoder.from_pretrained(run.folder), PACKAGED/('recordings' if args.events else 'demo')
    model.card = model_card(run, f'The model {out.name!r} of cmlf', out.name)
    if args.events: model.card = re.sub(r'(?<=## Licence\n\n).*?(?=\n\n## Limits)', _LICENCE, model.card, flags=re.S)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(Path(tmp)/'whole')
        shutil.rmtree(out, ignore_errors=True)
        shrink(Path(tmp)/'whole', out)
    if args.events: add_credits(args.events, out)
    if args.esc: measure(out.name, args.esc)
    size = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())
    log(f'{out}: {size / 1e6:.1f} MB, {run.retrieval()}')

if __name__ == '__main__':
    try: main()
    except CmlfError as e: sys.exit(f'demo_model: {e}')

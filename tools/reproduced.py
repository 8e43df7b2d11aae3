"""Fill in REPRODUCED.md: run its commands here, measure them, compare their numbers.

    python tools/reproduced.py                            all parts that are not yet answered here
    python tools/reproduced.py --profile smoke            the quick ones
    python tools/reproduced.py --only 'check tables' --again
    python tools/reproduced.py --only nothing             only write the form anew
    python tools/reproduced.py --answer 'field=yes: ...'  what only a person can answer
"""
import argparse, sys

from cmlf.appendix.reproduced import FORM, fill
from cmlf.core import CmlfError

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--profile', default='mini', help='smoke: the quick parts; mini: all (default)')
    parser.add_argument('--only', default='', help='names of parts, with *')
    parser.add_argument('--again', action='store_true', help='ask also what is answered for this commit and machine')
    parser.add_argument('--answer', action='append', default=[], help='NAME=TEXT, repeat for more')
    parser.add_argument('--form', default=str(FORM), help='path of the form (default: REPRODUCED.md)')
    parser.add_argument('--work', default='', help='folder of what the commands write (default: runs/reproduced)')
    a = parser.parse_args()
    try: return 0 if fill(a.form, a.profile, a.only, a.again, a.answer, a.work) else 1
    except CmlfError as e: print(f'reproduced: {e}', file=sys.stderr)
    return 2

if __name__ == '__main__': sys.exit(main())

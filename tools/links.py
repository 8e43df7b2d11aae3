"""Check a built site: every link and anchor inside it leads somewhere, and nothing is loaded from elsewhere.

    python tools/links.py _site
"""
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {'img': 'src', 'script': 'src', 'audio': 'src', 'video': 'src', 'source': 'src', 'iframe': 'src', 'embed': 'src'}
ELSEWHERE = re.compile(r'(?:@import|url\()\s*["\']?(https?://[^"\')]+)')  # in a style sheet
ICONS = ('stylesheet', 'icon', 'preload', 'preconnect', 'dns-prefetch', 'modulepreload', 'manifest')

class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in LOADS and a.get(LOADS[tag]): self.loads.append(a[LOADS[tag]])
        if tag == 'link' and a.get('href') and set(ICONS) & set(a.get('rel', '').split()): self.loads.append(a['href'])

def faults(site:Path) -> list[str]:
    "One line for each link that leads nowhere and each thing that is loaded from elsewhere."
    texts = {p.resolve(): p.read_text() for p in sorted(site.rglob('*.html'))}
    pages, found = {p: Page(t) for p, t in texts.items()}, []
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        outside = [u for u in page.loads if urlsplit(u).scheme in ('http', 'https') or u.startswith('//')]
        outside += ELSEWHERE.findall(texts[path])
        found += [f'{where}: loads {u[:100]}' for u in outside]
        for url in dict.fromkeys(page.links + page.loads):
            if (fault := broken(url, path, pages, site.resolve())): found.append(f'{where}: {url[:100]}: {fault}')
    for path in site.rglob('*.css'):
        found += [f'{path.relative_to(site)}: loads {u}' for u in ELSEWHERE.findall(path.read_text())]
    return found

def broken(url, path, pages, site) -> str:
    "Why a link leads nowhere; '' where it does not."
    parts = urlsplit(url)
    if parts.scheme or parts.netloc: return ''
    name = unquote(parts.path)
    target = path if not name else (site/name.lstrip('/') if name.startswith('/') else path.parent/name).resolve()
    if target.is_dir(): target = target/'index.html'
    if not target.is_file(): return 'no such file'
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids | {'__tabbed'}: return 'no such anchor'
    return ''

def main():
    site = Path(sys.argv[1] if len(sys.argv) > 1 else '_site')
    if not (site/'index.html').is_file(): sys.exit(f'{site}: no site here; make site builds it')
    found = faults(site)
    print(*found, sep='\n') if found else print(f'{len(list(site.rglob("*.html")))} pages, every link leads somewhere')
    sys.exit(bool(found))

if __name__ == '__main__': main()

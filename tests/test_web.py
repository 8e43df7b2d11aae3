"The page of `cmlf serve`: its answers, what it refuses, and what one sees and hears in a browser."
import contextlib, http.client, json, logging, re, shutil, signal, socket, subprocess, sys, threading, time, urllib.parse, urllib.request
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from browser import browser
from cmlf.appendix import web
from cmlf.appendix.figures import write_spectrogram
from cmlf.cli import run_command
from cmlf.core import CmlfError, seed_everything
from cmlf.encoders import DualEncoder, ResNet38, TextEncoder
from cmlf.features import LogMel
from command import ROOT

for package in ('fastapi', 'uvicorn', 'faiss'): pytest.importorskip(package)
from cmlf.search import SoundIndex, build_index
from fastapi.testclient import TestClient

MARKUP = '<img src=x onerror="window.hacked=1">.wav'
LONG = 'tape.flac', 'old.aiff'
SCRIPT = 'A bell <b>rings</b><script>window.hacked=1</script>'

def scene(i, seconds):
    "Two seconds of a tone, two seconds of noise, and so on."
    t, random = np.arange(int(seconds * 16000)) / 16000, np.random.default_rng(i)
    tone, noise = np.sin(2 * np.pi * 150 * 1.6**i * t), random.normal(size=len(t))
    return .3 * np.where((t // 2 + i) % 2, tone, .3 * noise)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "An index of 12 sounds: two long ones, of which browsers do not play one; one in a folder; one with markup in its name and caption."
    folder = tmp_path_factory.mktemp('web')
    sounds = folder/'sounds'
    (sounds/'deep').mkdir(parents=True)
    names = [MARKUP, 'deep/horn.wav', 'old.aiff', 'tape.flac', *(f'{i:02}.wav' for i in range(8))]
    for i, name in enumerate(names): soundfile.write(sounds/name, scene(i, 20 if name in LONG else 2), 16000)
    captions = [(n, SCRIPT if n == MARKUP else f'Sound number {i} is heard') for i, n in enumerate(names)]
    pd.DataFrame(captions + [('00.wav', 'A second caption')], columns=['path', 'caption']).to_csv(sounds/'manifest.csv', index=False)
    seed_everything(0)
    model = DualEncoder(ResNet38(width=1), TextEncoder('tiny'), 8, 16)
    model.seconds = 2
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d): layer.momentum = 1.
    with torch.no_grad(): model.embed_audio(LogMel()(torch.tensor(np.stack([scene(i, 4) for i in range(8)]), dtype=torch.float32)))
    model.save_pretrained(folder/'model')
    build_index(sounds, str(folder/'model'), folder/'index')
    return folder

@pytest.fixture(scope='module')
def index(folder): return SoundIndex.open(folder/'index')

def client(index, **options): return TestClient(web.make_app(index), 'http://127.0.0.1:8000', **options)

@pytest.fixture(scope='module')
def ask(index): return client(index)

def number(index, file): return next(i for i, s in enumerate(index.sounds) if s['file'] == file)

def path_of(index, file): return index.root/file

# --- answers

def test_results_of_a_sentence_are_those_of_the_search(ask, index):
    answer = ask.get('/search', params=dict(q='a horn', k=4))
    found = index.find('a horn', 4)
    assert answer.status_code == 200 and answer.headers['content-type'] == 'application/json'
    assert [r['file'] for r in answer.json()['results']] == [h.file for h in found]
    assert [r['rank'] for r in answer.json()['results']] == [1, 2, 3, 4]
    assert str(index.root) not in answer.text  # paths of the machine stay on the server

def test_a_sound_is_not_like_itself(ask, index):
    n = number(index, 'deep/horn.wav')
    found = ask.get(f'/like/{n}?k=5').json()
    assert len(found['results']) == 5 and n not in [r['sound'] for r in found['results']]
    assert len(found['sentences']) == 5 and found['name'] == 'deep/horn.wav'

def test_like_asks_for_a_part_of_a_long_sound(ask, index):
    n = number(index, 'tape.flac')
    part = ask.get(f'/like/{n}?start=4&stop=6&k=3').json()
    assert part['seconds'] == 2
    assert [r['file'] for r in part['results']] == [h.file for h in index.similar(web.read_part(index.root/'tape.flac', 4, 6), 4) if h.sound != n][:3]

def test_a_sound_that_is_sent_finds_itself(ask, index):
    body = (index.root/'03.wav').read_bytes()
    found = ask.post('/like?name=mine.wav&k=3', content=body).json()
    assert found['name'] == 'mine.wav' and abs(found['seconds'] - 2) < .01
    assert found['results'][0]['file'] == '03.wav' and found['results'][0]['score'] > .999
    assert found['sentences'] == index.sentences(index.root/'03.wav', 5)
    assert found['picture'].startswith('data:image/png;base64,')

def test_an_index_without_captions(folder, tmp_path):
    shutil.copytree(folder/'sounds', tmp_path/'sounds')
    (tmp_path/'sounds'/'manifest.csv').unlink()
    build_index(tmp_path/'sounds', str(folder/'model'), tmp_path/'index')
    ask = client(SoundIndex.open(tmp_path/'index'))
    assert 'id="examples"' not in ask.get('/').text
    found = ask.get('/like/0').json()
    assert found['sentences'] == [] and found['results'][0]['captions'] == []

# --- sounds and pictures

def test_parts_of_a_file(ask, index):
    n, whole = number(index, '00.wav'), (index.root/'00.wav').read_bytes()
    assert ask.get(f'/sound/{n}').content == whole
    for asked, part in {'bytes=0-99': whole[:100], 'bytes=100-': whole[100:], 'bytes=-10': whole[-10:]}.items():
        answer = ask.get(f'/sound/{n}', headers={'Range': asked})
        assert answer.status_code == 206 and answer.content == part
    assert ask.get(f'/sound/{n}', headers={'Range': f'bytes={len(whole)}-'}).status_code == 416

def test_a_format_that_browsers_do_not_play_is_converted_once(index, monkeypatch):
    made = []
    monkeypatch.setattr(web, 'to_flac', lambda path, out, make=web.to_flac: (made.append(path), make(path, out)))
    ask, n = client(index), number(index, 'old.aiff')
    for _ in range(2): answer = ask.get(f'/sound/{n}', headers={'Range': 'bytes=0-3'})
    assert answer.headers['content-type'] == 'audio/flac' and answer.content == b'fLaC' and len(made) == 1

@pytest.mark.parametrize('name, kind', [('a.wav', 'IMA_ADPCM'), ('a.wav', 'DOUBLE'), ('a.au', 'ULAW'), ('a.caf', 'PCM_24'), ('a.w64', 'FLOAT'), ('a.rf64', 'PCM_16')])
def test_the_copy_sounds_the_same(tmp_path, name, kind):
    wave = np.stack([scene(1, 1), scene(2, 1)], 1)
    soundfile.write(tmp_path/name, wave, 16000, kind)
    assert web.browser_type(tmp_path/name) == ''
    web.to_flac(tmp_path/name, tmp_path/'copy.flac')
    before, after = (soundfile.read(p)[0] for p in (tmp_path/name, tmp_path/'copy.flac'))
    assert after.shape == before.shape and np.abs(after - before).max() < 1e-3 and web.browser_type(tmp_path/'copy.flac') == 'audio/flac'

def test_a_copy_of_many_channels_has_one(tmp_path):
    soundfile.write(tmp_path/'six.caf', np.stack([scene(i, 1) for i in range(6)], 1), 16000)
    web.to_flac(tmp_path/'six.caf', tmp_path/'copy.flac')
    assert soundfile.info(tmp_path/'copy.flac').channels == 1

def test_spectrograms(ask, index):
    n = number(index, 'tape.flac')
    one, same, other = (ask.get(f'/spectrogram/{n}?start={s}&stop={s + 2}') for s in (2, 2, 4))
    assert one.headers['content-type'] == 'image/png' and one.content[:4] == b'\x89PNG'
    assert one.content == same.content != other.content
    for bad in ('start=2&stop=2', 'start=-1&stop=1', 'start=0&stop=90', 'start=nan&stop=1', 'start=0&stop=inf', 'start=99&stop=100'):
        answer = ask.get(f'/spectrogram/{n}?{bad}')
        assert answer.status_code == 400 and 'tape.flac' in answer.json()['error'], bad

def test_silence_has_a_black_picture():
    import matplotlib.image
    from io import BytesIO
    write_spectrogram(np.zeros(32000, np.float32), out := BytesIO())
    picture = matplotlib.image.imread(BytesIO(out.getvalue()))
    assert picture[..., :3].max() < .6 and len(np.unique(picture.reshape(-1, 4), axis=0)) == 1

# --- refused

def line(answer, status, *words):
    assert answer.status_code == status, answer.text
    text = answer.json()['error']
    assert len(text.splitlines()) == 1
    for word in words: assert word in text

def test_bad_queries_give_one_line(ask):
    line(ask.get('/search'), 400, 'empty')
    line(ask.get('/search?q=%20%20'), 400, 'empty')
    line(ask.get('/search', params=dict(q='x' * 1001)), 400, '1,001')
    for k in (0, -1, 101): line(ask.get(f'/search?q=rain&k={k}'), 400, f'k={k}')
    line(ask.get('/search?q=rain&k=many'), 422, 'k')
    line(ask.get('/no/such/page'), 404, '/no/such/page')
    line(ask.post('/search?q=rain'), 405, '/search')

@pytest.mark.parametrize('address', ['sound', 'spectrogram', 'like'])
def test_unknown_numbers(ask, address):
    for n in (-1, 12, 10**30): line(ask.get(f'/{address}/{n}'), 404, str(n))
    line(ask.get(f'/{address}/one'), 422, 'n')

def test_a_file_that_is_gone_or_damaged_is_named(index, tmp_path):
    ask, n = client(SimpleNamespace(root=tmp_path, facts=index.facts, sounds=index.sounds)), number(index, 'old.aiff')
    for address in (f'/sound/{n}', f'/spectrogram/{n}', f'/like/{n}'): line(ask.get(address), 404, 'old.aiff', 'index the folder again')
    (tmp_path/'old.aiff').write_text('no sound')
    for address in (f'/sound/{n}', f'/spectrogram/{n}', f'/like/{n}'): line(ask.get(address), 400, 'old.aiff', 'not readable as sound')

def test_large_uploads_are_refused_early(ask):
    line(ask.post('/like', content=b'x' * (web.MAX_BYTES + 1)), 413, '20 MB')
    read = []
    def endless():
        for _ in range(100): read.append(1); yield b'x' * 2**20
    line(ask.post('/like', content=endless()), 413, '20 MB')  # without a length

def test_bad_uploads_give_one_line(ask, tmp_path):
    def sent(wave, rate=8000):
        soundfile.write(tmp_path/'a.wav', wave, rate, 'FLOAT')
        return (tmp_path/'a.wav').read_bytes()
    line(ask.post('/like?name=a.wav'), 400, 'empty')
    line(ask.post('/like?name=a.wav', content=b'no sound at all'), 415, 'a.wav', 'not readable as sound')
    line(ask.post('/like?name=a.wav', content=sent(np.zeros(0))), 400, 'a.wav')
    line(ask.post('/like?name=a.wav', content=sent(np.zeros(61 * 8000))), 413, 'a.wav', '61 s')
    line(ask.post('/like?name=a.wav', content=sent(np.zeros(10))), 400, 'too short')
    line(ask.post('/like?name=a.wav', content=sent(np.full(8000, np.nan))), 400, 'NaN')
    line(ask.post('/like', params=dict(name='two\nlines' + 'x' * 500), content=b'?'), 415, 'x' * 90)

def test_an_unexpected_error_is_one_line(index):
    broken = SimpleNamespace(root=index.root, facts=index.facts, sounds=index.sounds, find=lambda *a: 1 / 0)
    answer = client(broken, raise_server_exceptions=False).get('/search?q=rain')
    line(answer, 500, 'ZeroDivisionError')
    assert answer.headers['x-content-type-options'] == 'nosniff'

def test_other_sites_are_refused(ask):
    for host in ('evil.example', 'evil.example:8000', '127.0.0.1.evil.example', '192.168.0.1', ''):
        answer = ask.get('/', headers={'Host': host})
        assert answer.status_code == 400 and answer.headers['x-content-type-options'] == 'nosniff', host
    for host in ('127.0.0.1', '127.0.0.1:9', 'localhost:8000', 'LOCALHOST'): assert ask.get('/', headers={'Host': host}).status_code == 200, host
    for origin in ('http://evil.example', 'null', 'http://127.0.0.1:9', 'https://127.0.0.1:8000'):
        line(ask.post('/like', content=b'x', headers={'Origin': origin}), 403, 'another site')
    assert ask.get('/search?q=rain', headers={'Origin': 'http://127.0.0.1:8000'}).status_code == 200

def test_headers_of_every_answer(ask):
    for address in ('/', '/search?q=rain', '/search', '/sound/0', '/spectrogram/0?stop=1', '/nothing', '/files/search.js'):
        headers = ask.get(address).headers
        assert "default-src 'self'" in headers['content-security-policy'] and 'unsafe' not in headers['content-security-policy']
        assert headers['x-content-type-options'] == 'nosniff' and headers['cross-origin-resource-policy'] == 'same-origin'

def test_markup_is_escaped_in_the_page(ask, index):
    assert any(s['captions'][0] == SCRIPT for s in index.sounds)
    page = ask.get('/').text
    assert 'A bell &lt;b&gt;rings' in page and '<b>rings' not in page and page.count('<script') == 1
    assert 'A bell &lt;b' not in ask.get('/?q=' + urllib.parse.quote(SCRIPT)).text.split('id="examples"')[0]

def test_nothing_comes_from_elsewhere():
    for name in ('search.html', 'search.css', 'base.css', 'search.js', 'recorder.js', 'icon.svg'):
        text = (ROOT/'cmlf/templates'/name).read_text().replace('http://www.w3.org/2000/svg', '')
        assert not re.search(r'(?:https?:)?//[\w-]+\.\w|@import|\bonclick=|\bstyle=', text), name
        assert 'innerHTML' not in text and 'insertAdjacentHTML' not in text and 'eval(' not in text

# --- a server

@contextlib.contextmanager
def running(index):
    "The page on a port of its own; gives the address."
    sock = web._listen('127.0.0.1', 0)
    server = web._server(web.make_app(index))
    thread = threading.Thread(target=server.run, args=([sock],))
    port = sock.getsockname()[1]
    thread.start()
    try: yield f'http://127.0.0.1:{port}'
    finally:
        server.should_exit = True
        thread.join(20)

@pytest.fixture(scope='module')
def address(index):
    with running(index) as address: yield address

def test_no_path_leaves_the_index(address):
    port = urllib.parse.urlsplit(address).port
    for start in ('/', '/sound/', '/files/', '/spectrogram/', '/like/'):
        for path in ('../../../../etc/passwd', '..%2f..%2f..%2fetc%2fpasswd', '%2e%2e/%2e%2e/etc/passwd', '/etc/passwd', '....//etc/passwd', 'page.html',
                     'search.js%00', '..\\search.js'):
            connection = http.client.HTTPConnection('127.0.0.1', port, timeout=10)
            connection.putrequest('GET', start + path, skip_host=True)  # as it is written
            connection.putheader('Host', f'127.0.0.1:{port}')
            connection.endheaders()
            answer = connection.getresponse()
            assert answer.status in (404, 422) and b'root:' not in answer.read(), start + path
            connection.close()

def test_the_page_answers_while_the_model_works(index):
    free = threading.Event()
    class Slow:
        root, facts, sounds = index.root, index.facts, index.sounds
        def find(self, q, k): free.wait(30); return index.find(q, k)
    get = lambda address: urllib.request.urlopen(address, timeout=20).read()
    with running(Slow()) as address:
        waiting = [threading.Thread(target=get, args=(f'{address}/search?q=rain',)) for _ in range(60)]  # more than the server has threads
        try:
            for t in waiting: t.start()
            time.sleep(.5)
            assert b'<title>' in get(address) and get(f'{address}/spectrogram/0?stop=1') and get(f'{address}/sound/0')
            assert not free.is_set() and all(t.is_alive() for t in waiting)
        finally: free.set()
        for t in waiting: t.join(20)

def test_an_interrupted_upload_is_no_error_of_the_server(address):
    "A new query interrupts the one before."
    port, seen = urllib.parse.urlsplit(address).port, logging.Handler()
    seen.emit = lambda record: lines.append(record.getMessage())
    lines = []
    logging.getLogger('uvicorn.error').addHandler(seen)
    try:
        with socket.create_connection(('127.0.0.1', port)) as s:
            s.sendall(f'POST /like HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1000\r\n\r\npart'.encode())
            time.sleep(.3)
        time.sleep(.3)
        assert urllib.request.urlopen(address).status == 200 and lines == []
    finally: logging.getLogger('uvicorn.error').removeHandler(seen)

def test_only_this_machine_is_served(index):
    for host in ('0.0.0.0', '192.168.0.1', 'example.org', ''):
        with pytest.raises(CmlfError, match='only for this machine'): web.serve(index, host)

def assert_refused_here(capsys, arguments, *words):
    "As `assert_refused`, without the seconds that a new process takes."
    capsys.readouterr()
    assert run_command(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for word in words: assert word in error

def test_serve_ends_quietly(folder, tmp_path, capsys):
    "The address on stdout, nothing on stderr; Ctrl-C ends it although a player holds a sound that is half sent."
    shutil.copytree(folder/'index', tmp_path/'index')
    record = json.loads((tmp_path/'index/index.json').read_text())
    (tmp_path/'index/index.json').write_text(json.dumps(record | dict(root=str(tmp_path))))
    soundfile.write(tmp_path/'00.wav', np.zeros(20_000_000, np.int16), 8000)  # too much for the buffers of a connection
    command = [sys.executable, '-c', 'from cmlf.cli import main; main()', 'serve', tmp_path/'index', '--port', '0']
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        first = process.stdout.readline()
        port = int(re.match(r'http://127\.0\.0\.1:(\d+) ', first)[1])
        connection, player = (http.client.HTTPConnection('127.0.0.1', port, timeout=20) for _ in range(2))
        connection.request('GET', '/search?q=rain&k=12')
        found = json.load(connection.getresponse())['results']
        player.request('GET', f'/sound/{next(r["sound"] for r in found if r["file"] == "00.wav")}')
        assert len(player.getresponse().read(1000)) == 1000
        assert_refused_here(capsys, ['serve', folder/'index', '--port', port], str(port), 'in use', '--port')
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, '', '')
    finally: process.kill()

def test_bad_arguments_of_serve(folder, tmp_path, capsys):
    assert_refused_here(capsys, ['serve', tmp_path], str(tmp_path), 'cmlf index')
    assert_refused_here(capsys, ['serve', folder/'index', '--port', 70000], '70000')

# --- in a browser

_FAKE = '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream', '--autoplay-policy=no-user-gesture-required'

@pytest.fixture(scope='module')
def chrome(tmp_path_factory):
    with browser(tmp_path_factory.mktemp('browser')/'profile', *_FAKE) as tab:
        for domain in ('Page', 'Runtime', 'Network', 'Log', 'DOM', 'Accessibility'): tab.send(f'{domain}.enable')
        yield tab

@pytest.fixture
def tab(chrome, address):
    "A page that is at the start; at the end, nothing failed and nothing came from elsewhere."
    chrome.asked.clear(); chrome.problems.clear()
    chrome.size(1200, 900)
    chrome.open(f'{address}/')
    yield chrome
    chrome.value('0')
    assert chrome.problems == []
    assert all(a.startswith((address, 'data:', 'blob:')) for a in chrome.asked)

CARDS = 'document.querySelectorAll("#results > li").length'
READY = f'document.querySelector("#found").getAttribute("aria-busy") === "false" && {CARDS}'

def test_type_a_query(tab, address):
    assert tab.value('document.activeElement.id') == 'q'  # without a click
    tab.keys('a horn\n')
    assert tab.wait(READY) == 10
    assert tab.value('location.href') == f'{address}/?q=a+horn'
    files = tab.value('[...document.querySelectorAll(".file")].map(f => f.textContent)')
    tab.send('Page.reload')
    tab.wait(f'performance.getEntriesByType("navigation")[0].type === "reload" && {READY}')
    assert tab.value('[...document.querySelectorAll(".file")].map(f => f.textContent)') == files
    assert tab.value('document.querySelector("#q").value') == 'a horn' and 'a horn' in tab.value('document.title')

def test_back_and_forward(tab, address):
    tab.keys('one\n'); tab.wait(READY)
    tab.value('document.querySelector("#q").select()')
    tab.keys('two\n')
    tab.wait('document.querySelector("#heading").textContent.includes("two")')
    tab.value('history.back()')
    tab.wait('document.querySelector("#heading").textContent.includes("one") && document.querySelector("#q").value === "one"')
    tab.value('history.back()')
    tab.wait('document.querySelector("#found").hidden && !document.querySelector("#examples").hidden')

@pytest.mark.parametrize('file', LONG)
def test_a_player_starts_at_the_match(tab, address, file):
    tab.open(f'{address}/?q=sound&k=12')
    tab.wait(READY)
    start = tab.value(f'''(() => {{ const card = [...document.querySelectorAll("#results > li")].find(c => c.querySelector(".file").textContent === "{file}")
        window.player = card.querySelector("audio"); return card.querySelector(".range").textContent }})()''')
    m, s = re.match(r'match at (\d+):([\d.]+)–', start).groups()
    assert tab.value('player.readyState') == 0  # nothing is loaded before somebody listens
    tab.value('player.muted = true; player.play()')
    tab.wait('player.readyState >= 3 && player.currentTime > 0')
    assert abs(tab.value('player.duration') - 20) < .1
    assert 0 <= tab.value('player.currentTime') - (60 * int(m) + float(s)) < 3
    tab.wait('!player.closest(".card").querySelector(".now").hidden')
    others = tab.value('document.querySelectorAll("audio")[0].muted = true; document.querySelectorAll("audio")[0] !== player ? 0 : 1')
    tab.value(f'document.querySelectorAll("audio")[{others}].play()')
    tab.wait('player.paused')

def test_every_sound_can_be_played(tab, address):
    tab.open(f'{address}/?q=sound&k=12')
    assert tab.wait(READY) == 12
    tab.value('document.querySelectorAll("#results audio").forEach(a => { a.preload = "metadata"; a.load() })')
    tab.wait('[...document.querySelectorAll("#results audio")].every(a => a.duration > 1.9)')
    assert tab.value('[...document.querySelectorAll("#results .problem")].every(p => p.hidden)')

def test_pictures_are_shown(tab, address):
    tab.open(f'{address}/?q=sound')
    tab.wait(READY)
    tab.value('document.querySelectorAll("img").forEach(i => i.loading = "eager")')
    tab.wait('[...document.images].every(i => i.complete && i.naturalWidth)')
    assert all('Spectrogram of' in alt for alt in tab.value('[...document.querySelectorAll("#results img")].map(i => i.alt)'))

def test_markup_stays_text(tab, address, index):
    for query, caption in ((f'q={urllib.parse.quote(SCRIPT)}&k=12', True), (f'like={number(index, MARKUP)}', False), (f'like={number(index, "00.wav")}&k=12', True)):
        tab.open(f'{address}/?{query}')
        tab.wait(READY)
        shown = tab.value('document.body.innerText')
        assert MARKUP in shown and ('<b>rings</b><script>' in shown or not caption)
        assert tab.value('document.querySelectorAll("main script, #found b, main img[src=x]").length') == 0
        assert tab.value('window.hacked') is None

@pytest.mark.parametrize('width', [390, 320])
def test_nothing_is_wider_than_a_phone(tab, address, index, width):
    tab.size(width, 844)
    for query in ('', '?q=sound&k=12', f'?like={number(index, MARKUP)}', '?q=%20'):
        tab.open(f'{address}/{query}')
        if query and '%20' not in query: tab.wait(READY)
        assert tab.value('document.documentElement.scrollWidth') <= width, query
        beyond = '[...document.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length'
        assert tab.value(beyond) == 0, query

def test_injected_markup_does_nothing(tab):
    "If a text were shown as HTML after all, the policy stops its scripts and pictures."
    tab.value("""document.body.insertAdjacentHTML('beforeend', '<img src="/nothing" onerror="window.hacked=1"><img src="http://127.0.0.2/x.png">')
        document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))""")
    for _ in range(50):
        if len(tab.problems) >= 3: break
        tab.value('0'); time.sleep(.1)
    assert len(tab.problems) == 3 and all('Content Security Policy' in str(p) for p in tab.problems)
    assert tab.value('window.hacked') is None
    tab.problems.clear(); tab.asked.clear()

def test_every_control_has_a_name(tab, address):
    tab.open(f'{address}/?like=0')
    tab.wait(READY)
    nodes = tab.send('Accessibility.getFullAXTree')['nodes']
    roles = {'button', 'link', 'searchbox', 'textbox', 'image', 'audio', 'group'}
    named = [(n['role']['value'], n.get('name', {}).get('value', '')) for n in nodes if not n['ignored'] and n.get('role', {}).get('value') in roles]
    assert ('searchbox', 'Describe a sound') in named and len([r for r, _ in named if r == 'link']) > 10
    assert all(name.strip() for role, name in named if role != 'group'), [n for n in named if not n[1].strip()]

def press(tab, key, code):
    for kind in ('rawKeyDown', 'keyUp'): tab.send('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)

def test_it_works_by_keyboard(tab, address):
    tab.keys('a horn\n'); tab.wait(READY)
    seen = []
    for _ in range(40):
        press(tab, 'Tab', 9)
        seen.append(tab.value('(e => e.id || e.className || e.tagName)(document.activeElement)'))
        if seen[-1] == 'button like': break
    assert [s for s in seen if s in ('main', 'file', 'record', 'AUDIO', 'button like')][:3] == ['main', 'file', 'record'] and 'AUDIO' in seen
    assert tab.value('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    tab.keys('\n')
    tab.wait(f'location.search.startsWith("?like=") && {READY}')
    assert tab.wait('document.activeElement.id') == 'heading'
    assert tab.value('document.querySelector("#mine img").naturalWidth') > 50

def test_more_results_are_added(tab, address):
    tab.keys('a horn\n'); tab.wait(READY)
    first = tab.value('window.first = document.querySelector("#results > li"); first.querySelector(".file").textContent')
    tab.value('document.querySelector("#more").click()')
    tab.wait(f'{CARDS} === 12')
    assert tab.value('first === document.querySelector("#results > li")') and tab.value('first.querySelector(".file").textContent') == first
    assert tab.value('document.querySelector("#more").hidden') and 'k=12' in tab.value('location.search').replace('k=20', 'k=12')

def test_errors_are_announced(tab):
    tab.keys('  \n')
    assert 'the query is empty' in tab.wait('document.querySelector("[role=alert]").textContent')
    assert tab.value('document.querySelector("#found").hidden')
    tab.keys('rain\n'); tab.wait(READY)
    assert tab.value('document.querySelector("[role=alert]").textContent') == ''
    assert tab.value('document.querySelector("[role=status]").textContent') == '10 results of 12 sounds'

def choose(tab, path):
    root = tab.send('DOM.getDocument')['root']['nodeId']
    node = tab.send('DOM.querySelector', nodeId=root, selector='#file')['nodeId']
    tab.send('DOM.setFileInputFiles', nodeId=node, files=[str(path)])

MINE = 'document.querySelector("#mine .card") && ' + READY

def test_choose_a_sound(tab, index):
    choose(tab, index.root/'03.wav')
    assert tab.wait(MINE) == 10
    assert tab.value('document.querySelector(".file").textContent') == '03.wav'
    assert tab.value('document.querySelectorAll(".sentences li").length') == 5
    tab.value('document.querySelector("#mine audio").muted = true; document.querySelector("#mine audio").play()')
    tab.wait('document.querySelector("#mine audio").duration > 1.9')
    tab.value('history.back()'); tab.wait('document.querySelector("#found").hidden')
    tab.value('history.forward()'); tab.wait(MINE)  # the sound is still there

def test_a_bad_file_gives_a_line(tab, tmp_path):
    (tmp_path/'notes.wav').write_text('not a sound')
    choose(tab, tmp_path/'notes.wav')
    assert 'notes.wav: not readable as sound' in tab.wait('document.querySelector("#error").textContent')
    (tmp_path/'large.wav').write_bytes(bytes(web.MAX_BYTES + 1))
    choose(tab, tmp_path/'large.wav')
    tab.wait('document.querySelector("#error").textContent.includes("large.wav: larger than 20 MB")')

def test_drop_a_sound(tab, index):
    n = number(index, '03.wav')
    tab.value(f'''fetch("/sound/{n}").then(a => a.blob()).then(b => {{ const data = new DataTransfer()
        data.items.add(new File([b], "dropped.wav"))
        document.querySelector("#own").dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true, cancelable: true}})) }})''')
    tab.wait(MINE)
    assert 'dropped.wav' in tab.value('document.querySelector("#heading").textContent')
    assert tab.value('document.querySelector(".file").textContent') == '03.wav'

def test_record_a_sound(tab):
    tab.value('document.querySelector("#record").click()', userGesture=True)
    tab.wait('/Stop .0:0[1-9]/.test(document.querySelector("#record").textContent)')
    tab.value('document.querySelector("#record").click()')
    tab.wait(MINE)
    assert 'recording.wav' in tab.value('document.querySelector("#heading").textContent')
    tab.value('document.querySelector("#mine audio").muted = true; document.querySelector("#mine audio").play()')
    tab.wait('document.querySelector("#mine audio").duration > .8')
    assert tab.value('document.querySelector("#record").textContent').strip() == 'Record'

def test_what_only_the_browser_can_read_is_converted(tab):
    "A webm file, which libsndfile does not read."
    tab.value('''microphone().then(stream => { const found = [], recorder = new MediaRecorder(stream)
        recorder.ondataavailable = e => found.push(e.data)
        recorder.onstop = () => take(new Blob(found), "phone.webm")
        recorder.start(); setTimeout(() => { recorder.stop(); stream.getTracks().forEach(t => t.stop()) }, 1500) })''', userGesture=True)
    tab.wait(MINE)
    assert 'phone.webm' in tab.value('document.querySelector("#heading").textContent')
    tab.problems[:] = [p for p in tab.problems if '415' not in str(p)]

def test_dark_and_light(tab):
    colours = []
    for dark in (False, True):
        tab.size(1200, 900, dark)
        colours.append(tab.value('getComputedStyle(document.body).backgroundColor'))
    assert colours == ['rgb(246, 247, 249)', 'rgb(18, 22, 27)']

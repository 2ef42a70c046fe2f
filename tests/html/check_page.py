"""The page of `orrery report` in a real browser: it asks for nothing, breaks no policy, and works.

  check_page.py --orrery BIN --root SOURCE --work DIR [--cache DIR]

Exits 77, which CTest takes as skipped, where there is no Chromium. Pictures are left in DIR. Where npm can
get axe-core (once, into the cache), that has its say on accessibility, too.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time

sys.dont_write_bytecode = True  # nothing is left in the source
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from chromium import Page, find_chromium

HOSTILE = '</script><img src=x onerror="window.hacked=1"><!--<script>'

# Contrast of every text with what is behind it, by WCAG 2.1's formula; canvas and disabled text left out.
CONTRAST = r'''(() => {
  const parse = (c) => { const m = c.match(/[\d.]+/g).map(Number); return m.length === 3 ? [...m, 1] : m; };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (node) => { const layers = [];
    for (let n = node; n; n = n.parentElement) { const c = parse(getComputedStyle(n).backgroundColor); if (c[3] > 0) { layers.push(c); if (c[3] === 1) break; } }
    let at = [255, 255, 255, 1]; for (const c of layers.reverse()) at = over(c, at); return at; };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const node = walker.currentNode.parentElement;
    if (!text || !node.getClientRects().length || /^(SCRIPT|NOSCRIPT|TITLE|STYLE)$/i.test(node.tagName) || node.closest('.skip, details:not([open]) > :not(summary)')) continue;
    const style = getComputedStyle(node);
    const svg = node instanceof SVGElement;
    const ink = over(parse(svg ? style.fill : style.color), behind(node));
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) poor.push(`${ratio.toFixed(2)} ${node.tagName}.${node.getAttribute('class')} "${text.slice(0, 30)}"`);
  }
  return poor;
})()'''

# Colours of bars against paper: 3 to 1 (WCAG 2.1, 1.4.11), but for the bubble, which is what is not there.
GRAPHICS = r'''(() => {
  const hex = (h) => [1, 3, 5].map((i) => parseInt(h.slice(i, i + 2), 16) / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  const light = (h) => { const [r, g, b] = hex(h); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const style = getComputedStyle(document.documentElement);
  const value = (name) => light(style.getPropertyValue('--' + name).trim());
  return ['forward', 'backward', 'weight', 'overlapped', 'communication', 'optimizer'].filter((name) => {
    const [a, b] = [value(name), value('paper')].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 3;
  });
})()'''


AXE = 'axe-core@4.10.3'
AXE_SHA256 = '0f2b4d7dcdf7d1219df8d1959ad68e565f51d14c3f0d88bb71cd59abeb956292'


def find_axe(cache):
    """The script, or '' where it is not to be had."""
    path = os.path.join(cache, AXE + '.js')
    if os.path.exists(path) or not shutil.which('npm'):
        return path if os.path.exists(path) else ''
    os.makedirs(cache, exist_ok=True)
    try:
        subprocess.run(['npm', 'pack', AXE, '--silent', '--fetch-retries=0', '--fetch-timeout=20000'], cwd=cache,
                       check=True, timeout=60, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        package = os.path.join(cache, AXE.replace('@', '-') + '.tgz')
        with open(package, 'rb') as file:
            if hashlib.sha256(file.read()).hexdigest() != AXE_SHA256:
                raise RuntimeError(AXE + ' is not the one that was reviewed')
        with tarfile.open(package) as archive, open(path, 'wb') as file:
            file.write(archive.extractfile('package/axe.min.js').read())
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        print('without axe-core: %s' % error)
        return ''
    return path


class Checks:
    def __init__(self):
        self.failed = []
        self.count = 0

    def equal(self, what, is_, wanted):
        self.count += 1
        if is_ != wanted:
            self.failed.append('%s: %r, not %r' % (what, is_, wanted))

    def true(self, what, is_, why=''):
        self.count += 1
        if not is_:
            self.failed.append('%s%s' % (what, ': ' + str(why) if why else ''))


def orrery(options, *args):
    subprocess.run([options.orrery, *args], check=True, cwd=options.root, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def nothing_wrong(check, page, name):
    check.equal(name + ': problems', page.problems, [])
    check.equal(name + ': policy violations', page.evaluate('window.violations'), [])
    check.equal(name + ': requests', [url for url in page.requests if not url.startswith('blob:')],
                [page.evaluate('location.href')])


def ready(page):
    page.wait('document.querySelector("canvas") && document.querySelector("canvas").dataset.ready === "true"')


def window_of(page):
    """[width, begin] of what the timeline shows, in seconds, as it says."""
    text = page.evaluate('document.querySelector(".timeline-window").textContent')
    units = {'s': 1, 'ms': 1e-3, 'µs': 1e-6, 'ns': 1e-9, 'min': 60, 'h': 3600}
    return [float(number) * units[unit] for number, unit in re.findall(r'([\d.]+)\u202f(\w+)', text)][:2]


def check_v3(options, check, page):
    """The main job: everything that the page has, against what other writers say of the same step."""
    scenario = 'scenarios/deepseek_v3_2048_h800.yaml'
    html = os.path.join(options.work, 'v3.html')
    trace = os.path.join(options.work, 'v3.trace.json.gz')
    report = os.path.join(options.work, 'v3.json')
    validation = os.path.join(options.work, 'validation.json')
    orrery(options, 'run', scenario, '--quiet', '--json', report, '--trace', trace, '--trace-ranks', '7')
    orrery(options, 'validate', '--json', validation)
    began = time.monotonic()
    orrery(options, 'report', scenario, '-o', html, '--target', 'tokens/day >= 250G', '--target',
           'days <= 45 for 14.8T tokens', '--tokens', '14.8T', '--usd-per-gpu-hour', '2', '--validation', validation)
    print('made in %.2f s, %d bytes' % (time.monotonic() - began, os.path.getsize(html)))
    check.true('size below 2 MB', os.path.getsize(html) < 2_000_000, os.path.getsize(html))

    page.media()
    page.open(html)
    ready(page)
    nothing_wrong(check, page, 'V3')
    sections = page.evaluate('[...document.querySelectorAll("main > section")].map((s) => s.id)')
    check.equal('sections', sections, ['answer', 'phases', 'timeline', 'memory', 'network', 'scaling', 'sensitivity',
                                       'validation', 'prices', 'assumptions', 'data'])
    with open(report) as file:
        run = json.load(file)
    check.equal('the report in the page is that of run --json',
                page.evaluate('JSON.stringify(JSON.parse(document.getElementById("page-data").textContent).scenarios[0].report)'),
                page.evaluate('JSON.stringify(%s)' % json.dumps(run)))
    page.screenshot(os.path.join(options.work, 'v3_light.png'))

    # the timeline by keyboard
    page.evaluate('document.querySelector("canvas").focus()')
    check.equal('level from afar', page.evaluate('document.querySelector("canvas").dataset.level'), 'cells')
    whole = window_of(page)[0]
    check.true('whole step', abs(whole / run['step_time_s'] - 1) < 0.005, whole)
    for _ in range(7):
        page.key('ArrowDown')
    for _ in range(5):
        page.key('+')
    page.evaluate('new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))')
    check.true('+ zooms', abs(window_of(page)[0] * 32 / whole - 1) < 0.02, window_of(page))
    check.equal('level nearer', page.evaluate('document.querySelector("canvas").dataset.level'), 'phases')
    begin = window_of(page)[1]
    page.key('ArrowRight')
    check.true('arrows move', window_of(page)[1] > begin)
    page.evaluate('document.querySelector("#timeline").scrollIntoView({behavior: "instant"})')
    page.screenshot(os.path.join(options.work, 'timeline_phases.png'), whole=False)
    for _ in range(4):
        page.key('+')
    page.evaluate('new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))')
    check.equal('level close up', page.evaluate('document.querySelector("canvas").dataset.level'), 'ops')
    page.screenshot(os.path.join(options.work, 'timeline_ops.png'), whole=False)

    # What the page says of ops is what the trace, another writer, has of them.
    with gzip.open(trace, 'rt') as file:
        events = [e for e in json.load(file)['traceEvents'] if e.get('cat') == 'compute' and e['pid'] == 7]
    seen = 0
    for _ in range(12):
        page.key('n')
        said = page.evaluate('document.querySelector(".timeline-status").textContent')
        found = re.match(r'position 7, compute: (.*?) \((.*)\) in (.*?), (?:layer (\d+), )?micro-batch (\d+), ', said)
        check.true('n tells an op', found, said)
        if not found:
            break
        at = re.search(r'([\d.]+)\u202f(\S+) from ([\d.]+)\u202f(\S+)$', said)
        units = {'s': 1e6, 'ms': 1e3, 'µs': 1, 'ns': 1e-3}
        duration = float(at[1]) * units[at[2]]
        near = [e for e in events if e['name'] == found[1] and e['args']['shape'] == found[2]
                and e['args']['phase'] == found[3] and str(e['args']['micro_batch']) == found[5]
                and abs(e['dur'] - duration) <= 0.006 * duration + 0.011
                and abs(e['ts'] - float(at[3]) * units[at[4]]) <= 0.51]
        check.true('the trace has it', near, said)
        seen += len(near) > 0
    check.equal('ops compared', seen, 12)
    page.key('Home')
    check.true('Home shows the whole step', abs(window_of(page)[0] - whole) < 1e-9)

    # by mouse
    box = page.evaluate('(() => { const b = document.querySelector("canvas").getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()')
    x, y = box[0] + box[2] / 2, box[1] + 60
    page.mouse('mouseWheel', x, y, deltaX=0, deltaY=-300, modifiers=2)
    check.true('Ctrl and wheel zoom', window_of(page)[0] < 0.5 * whole, window_of(page))
    begin = window_of(page)[1]
    page.mouse('mousePressed', x, y, button='left', clickCount=1)
    page.mouse('mouseMoved', x - 200, y, button='left', buttons=1)
    page.mouse('mouseReleased', x - 200, y, button='left', clickCount=1)
    check.true('dragging moves', window_of(page)[1] > begin, window_of(page))
    page.mouse('mousePressed', x, y, button='left', clickCount=1)
    page.mouse('mouseReleased', x, y, button='left', clickCount=1)
    check.true('a click names', page.evaluate('document.querySelector(".timeline-status").textContent').startswith('position '))
    page.evaluate('document.querySelector("[aria-label=\'The whole step\']").click()')

    # what can be taken away
    downloads = os.path.join(options.work, 'downloads')
    page.evaluate('[...document.querySelectorAll("#data button")].forEach((b) => ["prices.csv", "page.json"].includes(b.textContent) && b.click())')
    for name in ('prices.csv', 'page.json'):
        deadline = time.monotonic() + 20
        while not os.path.exists(os.path.join(downloads, name)) and time.monotonic() < deadline:
            time.sleep(0.1)
        check.true('download ' + name, os.path.exists(os.path.join(downloads, name)))
    with open(os.path.join(downloads, 'prices.csv'), encoding='utf-8') as file:
        check.equal('rows of prices.csv', len(file.read().splitlines()), 1 + len(run['prices']))
    nothing_wrong(check, page, 'V3 after use')
    check_accessible(options, check, page, 'V3')

    # themes, print, a small screen
    paper = page.evaluate('getComputedStyle(document.body).backgroundColor')
    pixel = 'Array.from(document.querySelector("canvas").getContext("2d").getImageData(2, 2, 1, 1).data)'
    before = page.evaluate(pixel)
    for scheme in ('light', 'dark'):
        page.media(scheme=scheme)
        page.evaluate('new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))')
        check.equal('contrast, ' + scheme, page.evaluate(CONTRAST), [])
        check.equal('contrast of bars, ' + scheme, page.evaluate(GRAPHICS), [])
    check.true('dark is dark', page.evaluate('getComputedStyle(document.body).backgroundColor') != paper)
    page.wait('JSON.stringify(%s) !== %s' % (pixel, json.dumps(json.dumps(before, separators=(',', ':')))), 10)
    page.screenshot(os.path.join(options.work, 'v3_dark.png'))
    page.media(kind='')
    page.pdf(os.path.join(options.work, 'v3.pdf'))
    with open(os.path.join(options.work, 'v3.pdf'), 'rb') as file:
        pages = len(re.findall(rb'/Type\s*/Page\b', file.read()))
    check.true('printed pages', 3 <= pages <= 16, pages)
    page.media(kind='print')
    check.equal('print hides what is for the screen', page.evaluate('[...document.querySelectorAll("nav, .controls")].filter((n) => n.getClientRects().length).length'), 0)
    page.media()
    page.open(html, width=390, height=800)
    ready(page)
    check.true('fits a small screen', page.evaluate('document.documentElement.scrollWidth <= innerWidth'),
               page.evaluate('document.documentElement.scrollWidth'))
    page.screenshot(os.path.join(options.work, 'v3_small.png'))


def check_policy(check, page):
    """The policy holds against what would get in."""
    page.evaluate('(() => { const s = document.createElement("script"); s.textContent = "window.hacked = 1"; document.body.append(s); })()')
    check.true('no other script runs', page.evaluate('window.hacked') is None)
    check.equal('no request leaves', page.evaluate('fetch("http://127.0.0.1:9/").then(() => "sent", () => "refused")'), 'refused')
    check.true('both are violations', len(page.evaluate('window.violations')) >= 2, page.evaluate('window.violations'))


def check_accessible(options, check, page, name):
    tree = page.call('Accessibility.getFullAXTree')['nodes']
    unnamed = [node['role']['value'] for node in tree if not node.get('ignored')
               and node['role']['value'] in ('button', 'link', 'image', 'img', 'table', 'region', 'application', 'combobox')
               and not node.get('name', {}).get('value')]
    check.equal(name + ': without a name', unnamed, [])
    levels = page.evaluate('[...document.querySelectorAll("h1, h2, h3")].map((h) => Number(h.tagName[1]))')
    check.true(name + ': headings in order', levels[0] == 1 and levels.count(1) == 1
               and all(b - a <= 1 for a, b in zip(levels, levels[1:])), levels)
    check.equal(name + ': ids twice', page.evaluate('(() => { const ids = [...document.querySelectorAll("[id]")].map((n) => n.id); return ids.filter((id, i) => ids.indexOf(id) !== i); })()'), [])
    check.equal(name + ': language', page.evaluate('document.documentElement.lang'), 'en')
    # Every place that takes the focus can be reached, and left, by Tab.
    page.evaluate('document.querySelector(".skip").focus()')
    reached = {-2}
    for _ in range(200):
        page.key('Tab')
        at = page.evaluate('(() => { const n = document.activeElement; return n === document.body ? -1 : [...document.querySelectorAll("*")].indexOf(n); })()')
        if at < 0 or at in reached:
            break
        reached.add(at)
    wanted = page.evaluate('document.querySelectorAll("button, canvas, nav a").length')
    check.true(name + ': reached by Tab', len(reached) >= wanted, '%d of %d' % (len(reached), wanted))
    if options.axe:
        with open(options.axe, encoding='utf-8') as file:
            page.evaluate(file.read() + '; undefined')
        for scheme in ('light', 'dark'):
            page.media(scheme=scheme)
            found = page.evaluate('axe.run(document, {resultTypes: ["violations"]}).then((r) => r.violations.map((v) => '
                                  'v.id + ": " + v.help + " (" + v.nodes.length + ", " + v.nodes[0].html.slice(0, 120) + ")"))')
            check.equal('%s: axe-core, %s' % (name, scheme), found, [])
        page.media()


def hostile_inputs(options):
    """A small scenario with all names hostile, and what the other verbs might write of it."""
    scenarios = os.path.join(options.root, 'scenarios')

    def hostile_copy(name, to):
        """With the name changed, and paths that hold from elsewhere."""
        with open(os.path.join(scenarios, name)) as file:
            text = file.read()
        folder = os.path.dirname(os.path.join(scenarios, name))
        text = re.sub(r'^(\w*): (\.\./\S+|\w+/\S+)$', lambda m: '%s: %s' % (m[1], os.path.normpath(os.path.join(folder, m[2]))), text, flags=re.M)
        text = re.sub(r'^  text: (\S+)$', lambda m: '  text: %s' % os.path.join(folder, m[1]), text, flags=re.M)
        text, names = re.subn(r'^name: .*$', "name: '%s'" % HOSTILE, text, flags=re.M)
        assert names == 1, name
        with open(os.path.join(options.work, to), 'w') as file:
            file.write(text)
        return file.name, text

    model, _ = hostile_copy('models/tiny_deepseek.yaml', 'hostile_model.yaml')
    cluster, _ = hostile_copy('clusters/h800_node.yaml', 'hostile_cluster.yaml')
    path, text = hostile_copy('tiny_deepseek_cpu.yaml', '"><img src=x onerror=hacked=1>.yaml')
    text = re.sub(r'^model: .*$', 'model: ' + model, text, flags=re.M)
    text = re.sub(r'^cluster: .*$', 'cluster: ' + cluster, text, flags=re.M)
    with open(path, 'w') as file:
        file.write(text)
    phases = {key: 0.5 for key in ('forward', 'backward', 'weight', 'overlapped', 'bubble', 'optimizer', 'exposed_communication')}
    evaluation = {'fits': True, 'memory_peak_bytes': 6 << 30, 'step_time_s': 3.5, 'phases_s': phases}
    layout = {'candidate': HOSTILE, 'gpus': 8, 'fits': True, 'step_time_s': 3.5, 'gpu_hours_per_trillion_tokens': 1e5,
              'memory_peak_bytes': 6 << 30, 'coarse': evaluation, 'full': evaluation}
    other = dict(layout, candidate='tp 2', step_time_s=4.0, memory_peak_bytes=4 << 30, full=None)
    documents = {
        'search': {'scenario': HOSTILE, 'memory_capacity_bytes': 80e9, 'certain': False, 'why_uncertain': HOSTILE,
                   'counts': {'combinations': 9, 'impossible': 1, 'candidates': 8, 'too_large': 2, 'timed': 6, 'simulated': 2},
                   'best': [layout, other], 'own': dict(other, candidate='own'), 'time_and_memory': [layout, other], 'time_and_gpus': [],
                   'gpu_hours_and_gpus': [], 'against_second': [{'phase': HOSTILE, 'winner_s': 1, 'other_s': 2}], 'against_own': [], 'nearest': None},
        'budget': {'recipe': HOSTILE, 'total': {'tokens': 14.8e12, 'gpu_hours': 2.8e6, 'wall_s': 5e6, 'cost_usd': 5.6e6},
                   'stages': [{'name': HOSTILE, 'kind': 'pre_training', 'gpus': 2048, 'tokens': 14.8e12, 'gpu_hours': 2.7e6, 'wall_s': 4.8e6, 'cost_usd': 5.4e6},
                              {'name': 'b', 'kind': 'fine_tuning', 'gpus': 2048, 'tokens': 1e9, 'gpu_hours': 1e5, 'wall_s': 2e5, 'cost_usd': 2e5}],
                   'assumptions': {'goodput': 0.95, 'goodput_source': HOSTILE, 'usd_per_gpu_hour': 2},
                   'published': [{'of': HOSTILE, 'quantity': 'gpu_hours', 'predicted': 2.7e6, 'published': 2.788e6, 'error': -0.03, 'source': HOSTILE}]},
        'reliability': {'gpus': 2048, 'useful_s': 4e6, 'mtbf_s': 20000, 'trials': 1000, 'goodput': {'p10': 0.9, 'p50': 0.93, 'p90': 0.95, 'mean': 0.93},
                        'calendar_s': {'p10': 4.2e6, 'p50': 4.3e6, 'p90': 4.5e6, 'mean': 4.3e6},
                        'mean_s': {'useful': 4e6, 'checkpoint': 1e5, 'rework': 1e5, 'detection': 1e4, 'restart': 5e4, 'waiting': 1e4, 'maintenance': 1e4, 'slow': 1e4},
                        'checkpoint': {'bytes': 4e12, 'interval_s': 600, 'optimum_s': 500}, 'failures': [{'what': HOSTILE, 'mtbf_s': 3e4, 'events': 130}]},
        'validation': {'runs': [{'file': HOSTILE, 'name': HOSTILE, 'scenario': HOSTILE, 'rows': [
            {'quantity': 'step_time_s', 'predicted': 1, 'published': 1.1, 'error': -0.09, 'aim': 0.05, 'met': False, 'source': HOSTILE, 'note': HOSTILE}]}]},
    }
    arguments = []
    for name, document in documents.items():
        with open(os.path.join(options.work, name + '.hostile.json'), 'w') as file:
            json.dump(document, file)
        arguments += ['--' + name, file.name]
    return path, arguments


def check_hostile(options, check, page):
    path, arguments = hostile_inputs(options)
    html = os.path.join(options.work, 'hostile.html')
    orrery(options, 'report', path, os.path.join(options.root, 'scenarios/llama3_70b_64_h100.yaml'), '-o', html, *arguments,
           '--target', 'days <= 60', '--target', 'mfu >= 40 %')
    page.open(html)
    ready(page)
    nothing_wrong(check, page, 'hostile')
    check.equal('the name is text', page.evaluate('document.querySelector("h1").textContent'), HOSTILE)
    check.true('the title too', HOSTILE in page.evaluate('document.title'))
    check.equal('no image came in', page.evaluate('document.images.length'), 0)
    check.true('nothing ran', page.evaluate('window.hacked') is None)
    check.equal('names of model and cluster are text', page.evaluate('[...document.querySelectorAll("#assumptions td")].filter((n) => n.textContent === %s).length' % json.dumps(HOSTILE)), 2)
    check.true('so is that of the file', '"><img src=x onerror=hacked=1>.yaml' in page.evaluate('document.getElementById("foot").textContent'))
    sections = page.evaluate('[...document.querySelectorAll("main > section")].map((s) => s.id)')
    for name in ('compare', 'search', 'budget', 'reliability', 'validation'):
        check.true('section ' + name, name in sections, sections)
    for name in ('search', 'budget', 'reliability', 'validation'):
        check.true(name + ' shows the name as it is', HOSTILE in page.evaluate('document.getElementById("%s").textContent' % name))
    page.screenshot(os.path.join(options.work, 'hostile.png'))
    check_accessible(options, check, page, 'hostile')
    # the other scenario
    page.evaluate('(() => { const s = document.getElementById("scenario"); s.value = 1; s.dispatchEvent(new Event("change")); })()')
    check.true('another scenario is chosen', page.evaluate('document.querySelector("h1").textContent').startswith('Llama'))
    ready(page)
    check_policy(check, page)


def check_uncertainty(options, check, page):
    """What `run --json --uncertainty` adds to a report is shown instead of the report's own sensitivity."""
    with open(os.path.join(options.work, 'hostile.html'), encoding='utf-8') as file:
        text = file.read()
    interval = {'p10': 0.013, 'p50': 0.014, 'p90': 0.016, 'mean': 0.014}
    added = {'draws': 200, 'step_time_s': interval, 'gpu_hours_per_trillion_tokens': interval, 'checked': 0, 'largest_difference': 0,
             'tornado': [{'family': 'GEMM <b>fp8', 'share': 0.4, 'spread': 0.1, 'step_p10_s': 0.0139, 'step_p90_s': 0.0145}]}
    # Data is not code: the policy has no hash of it.
    text = text.replace('"report":{', '"report":{"uncertainty":%s,' % json.dumps(added).replace('<', '\\u003c'), 1)
    text = text.replace('"gpu_hours":2800000.0,"wall_s"', '"gpu_hours":{"p10":2600000,"p50":2800000,"p90":3100000},"wall_s"')
    html = os.path.join(options.work, 'uncertain.html')
    with open(html, 'w', encoding='utf-8') as file:
        file.write(text)
    page.open(html)
    ready(page)
    nothing_wrong(check, page, 'uncertainty')
    said = page.evaluate('document.getElementById("sensitivity").textContent')
    check.true('the draws are told', '200 draws' in said and 'GEMM <b>fp8' in said, said[:300])
    check.true('and the interval', '13.0\u202fms to 16.0\u202fms (8 of 10)' in page.evaluate('document.getElementById("answer").textContent'))
    check.true('a budget has intervals', '2.80\u202fM (2.60\u202fM to 3.10\u202fM)' in page.evaluate('document.getElementById("budget").textContent'),
               page.evaluate('document.getElementById("budget").textContent')[:200])


def check_measured(options, check, page):
    """A step that ran, beside its simulation."""
    scenario = 'scenarios/tiny_deepseek_cpu.yaml'
    trace = os.path.join(options.work, 'ran.trace.json.gz')
    html = os.path.join(options.work, 'measured.html')
    orrery(options, 'run', scenario, '--execute', 'cpu', '--steps', '1', '--quiet', '--trace', trace)
    orrery(options, 'report', scenario, '--measured', trace, '-o', html)
    page.open(html)
    ready(page)
    nothing_wrong(check, page, 'measured')
    check.true('section measured', page.evaluate('!!document.getElementById("measured")'))
    with gzip.open(trace, 'rt') as file:
        events = [e for e in json.load(file)['traceEvents'] if e.get('ph') == 'X' and 'op' in e.get('args', {})]
    joined = page.evaluate('JSON.parse(document.getElementById("page-data").textContent).scenarios[0].measured.joined')
    ended = max(e['ts'] + e['dur'] for e in events) * 1e-6
    check.true('its end is the trace\'s', abs(joined['measured_step_s'] / ended - 1) < 1e-6, (joined['measured_step_s'], ended))
    page.evaluate('document.querySelector("#timeline").scrollIntoView({behavior: "instant"})')
    page.screenshot(os.path.join(options.work, 'measured.png'), whole=False)


def main():
    parser = argparse.ArgumentParser()
    for name in ('orrery', 'root', 'work'):
        parser.add_argument('--' + name, required=True)
    parser.add_argument('--cache', default='')
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        print('skipped: no chromium (Debian package chromium)')
        return 77
    options.axe = find_axe(options.cache) if options.cache else ''
    shutil.rmtree(options.work, ignore_errors=True)
    os.makedirs(os.path.join(options.work, 'downloads'))
    options.work = os.path.abspath(options.work)
    check = Checks()
    for part in (check_v3, check_hostile, check_uncertainty, check_measured):
        page = Page(chromium, os.path.join(options.work, 'downloads'))
        try:
            part(options, check, page)
        except Exception as error:  # the other parts still have something to say
            check.failed.append('%s: %s; problems: %s' % (part.__name__, error, page.problems))
        finally:
            page.close()
    for text in check.failed:
        print('FAILED ' + text)
    print('%d checks, %d failed%s' % (check.count, len(check.failed), '' if options.axe else ', without axe-core'))
    return 1 if check.failed else 0


if __name__ == '__main__':
    sys.exit(main())

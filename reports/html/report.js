// The capacity report: everything on the page is drawn from the JSON in #page-data.
//
// The contract, written by reports/capacity.cpp (to_json). Keys that are absent have no section.
//
//   scenarios: [{
//     file,                      name of the scenario's file, without its folder
//     targets: [{target, quantity, at_least, aim, value, low, high, verdict, margin, answer}]
//                                verdict: met | met_closely | missed_closely | missed
//     run: {tokens, gpu_hours, days, cost_usd}      of a whole run, where its tokens are known
//     report:                    what `orrery run --json` writes, `uncertainty` included
//     assumptions: [{group, what, value, source, share}]
//     scaling: {same_batch, growing_batch: {points: [{gpus, dp, global_batch, micro_batches, network,
//               step_time_s, tokens_per_day, efficiency, memory_peak_bytes, fits}], left_out: [{gpus, why}]}}
//     sensitivity: {step_time_s, change, spread, rows: [{kind, share, spread, faster_s, slower_s, by_spread_s}]}
//     timeline: {unit_s, step, cell_kinds, phases, shapes: [{label, shape}],
//                rows: [{rank, cells, lanes: [{stream, phases, ops}]}],
//                cell: {gap, duration, kind, stage, pair_stage, micro_batch, pair_micro_batch},
//                phase: {gap, duration, phase, layer, stage, micro_batch, ops}, op: {gap, duration, shape}}
//                                columns as unpack() reads them: row after row, lane after lane; gap from
//                                the end of the entry before it in its lane, times in units
//     measured: {file, timeline, joined}            joined: what `validate --execute --json` writes
//   }]
//   search, budget, reliability, validation         what these verbs write with --json, as it is
//
// Text of users' files reaches the page by textContent only.

'use strict';

(() => {
  const data = JSON.parse(document.getElementById('page-data').textContent);

  // ---- small helpers

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === 'onclick') node.addEventListener('click', value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  const sum = (list) => list.reduce((a, b) => a + b, 0);

  function digits(value, unit = '') {
    const size = Math.abs(value);
    const text = value.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
    return unit ? `${text}\u202f${unit}` : text;
  }
  function prefixed(value, prefixes, base = 1000) {
    let power = 0;
    while (Math.abs(value) >= 0.9995 * base && power + 1 < prefixes.length) {
      value /= base;
      ++power;
    }
    return digits(value, prefixes[power]);
  }
  const count = (value) => (Number.isInteger(value) && Math.abs(value) < 100000
    ? value.toLocaleString('en') : prefixed(value, ['', 'K', 'M', 'B', 'T', 'P']));
  const bytes = (value) => prefixed(value, ['B', 'kB', 'MB', 'GB', 'TB', 'PB']);
  const percent = (share, places = 1) => `${(100 * share).toFixed(places)}\u202f%`;
  const signed = (share) => `${share > 0 ? '+' : share < 0 ? '\u2212' : ''}${Math.abs(100 * share).toFixed(1)}\u202f%`;
  function seconds(value) {
    const size = Math.abs(value);
    if (size >= 2 * 86400) return digits(value / 86400, 'days');
    if (size >= 2 * 3600) return digits(value / 3600, 'h');
    if (size >= 120) return digits(value / 60, 'min');
    if (size >= 1 || size === 0) return digits(value, 's');
    if (size >= 1e-3) return digits(value * 1e3, 'ms');
    if (size >= 1e-6) return digits(value * 1e6, '\u00b5s');
    return digits(value * 1e9, 'ns');
  }
  const usd = (value) => `${count(value)}\u202fUSD`;
  const targetValue = (quantity, value) => ({
    'tokens/day': (v) => `${count(v)} tokens/day`,
    'tokens/s/GPU': (v) => `${digits(v)} tokens/s/GPU`,
    'step time': seconds,
    MFU: (v) => percent(v),
    memory: bytes,
    'GPU-hours': (v) => `${count(v)} GPU-hours`,
    days: (v) => `${digits(v)} days`,
    cost: usd,
  }[quantity] || String)(value);

  /// columns: [[heading, number?]]; rows of strings or nodes. A row that begins with null belongs to the one
  /// before it; the last cell of a short one is as wide as what is missing.
  function table(caption, columns, rows) {
    const kind = (column) => (columns[column][1] ? 'number' : null);
    const head = columns.map(([heading], c) => element('th', { scope: 'col', class: kind(c) }, heading));
    const body = rows.map((row, r) => {
      let span = 1;
      while (r + span < rows.length && rows[r + span][0] === null) ++span;
      return element('tr', {}, ...row.map((content, c) => {
        if (c > 0) return element('td', { class: kind(c), colspan: c + 1 === row.length && row.length < columns.length ? columns.length - c : null }, content);
        return content === null ? null
          : element('th', { class: kind(0), scope: span > 1 ? 'rowgroup' : 'row', rowspan: span > 1 ? span : null }, content);
      }));
    });
    return element('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': caption },
      element('table', {}, element('caption', {}, caption), element('thead', {}, element('tr', {}, ...head)),
        element('tbody', {}, ...body)));
  }

  /// The figures behind a chart, for those who cannot or will not read it.
  function tableBehind(caption, columns, rows) {
    return element('details', {}, element('summary', {}, 'Figures as a table'), table(caption, columns, rows));
  }

  const SHORT = { answer: 'Answer', compare: 'Side by side', phases: 'Step', timeline: 'Timeline', measured: 'Measured', memory: 'Memory', network: 'Network',
    scaling: 'Scaling', sensitivity: 'Sensitivity', search: 'Layouts', budget: 'Budget', reliability: 'Failures', validation: 'Validation', prices: 'Operations',
    assumptions: 'Assumptions', data: 'Data' };

  function section(id, title, lead, ...content) {
    const shown = content.filter((node) => node !== null);
    if (shown.length === 0) return null;
    return element('section', { id, 'aria-labelledby': `${id}-title` },
      element('h2', { id: `${id}-title` }, title),
      lead ? element('p', { class: 'lead' }, lead) : null, ...shown);
  }

  // ---- charts: SVG by D3, each with a name, a table behind it, and colours that style sheets give

  const WIDTH = 1040;
  const MARGIN_LEFT = 150;

  function chart(label, height) {
    const svg = d3.create('svg').attr('viewBox', `0 0 ${WIDTH} ${height}`).attr('role', 'img')
      .attr('aria-label', label).attr('class', 'chart');
    return svg;
  }
  const figure = (svg, ...rest) => element('figure', {}, element('div', { class: 'scroll chart-box' }, svg.node()), ...rest);

  /// `title` stands before the ticks of a horizontal axis.
  function axis(svg, generator, [x, y], title, titleAt = MARGIN_LEFT - 10) {
    const group = svg.append('g').attr('class', 'axis').attr('transform', `translate(${x},${y})`).call(generator);
    group.attr('fill', null).attr('font-size', null).attr('font-family', null);
    if (title) svg.append('text').attr('class', 'axis-title').attr('x', titleAt).attr('text-anchor', 'end').attr('y', y + 16).text(title);
    return group;
  }
  /// "0.00 s" is "0 s" on an axis, "2.50 s" is "2.5 s".
  const tick = (format) => (value) => format(value).replace(/(\.\d*?)0+(?=\D|$)/, '$1').replace(/\.(?=\D|$)/, '');

  /// Round numbers of the unit that suits the largest.
  function timeTicks(low, high, n) {
    const units = [[86400, 'days'], [3600, 'h'], [60, 'min'], [1, 's'], [1e-3, 'ms'], [1e-6, '\u00b5s']];
    const [unit, name] = units.find(([size]) => high >= 2 * size) || units[units.length - 1];
    const values = d3.ticks(low / unit, high / unit, n);
    const places = values.length > 1 ? Math.max(0, -Math.floor(Math.log10(values[1] - values[0]) + 1e-9)) : 0;
    return { values: values.map((v) => v * unit), format: (v) => `${(v / unit).toFixed(places)}\u202f${name}` };
  }

  function legend(entries) {
    return element('ul', { class: 'legend' }, ...entries.map(({ name, kind, value }) => element('li', {},
      element('span', { class: `swatch ${kind}`, 'aria-hidden': 'true' }), name,
      value ? element('span', { class: 'legend-value' }, ` ${value}`) : null)));
  }

  /// Horizontal bars of parts. rows: [{name, parts: [number by key]}]; marker: {at, name}.
  function stackedBars({ label, rows, keys, format, title, marker }) {
    const band = rows.length > 24 ? 16 : 22;
    const height = rows.length * band + 44;
    const svg = chart(label, height);
    const most = Math.max(...rows.map((row) => sum(row.parts)), marker ? marker.at : 0);
    const x = d3.scaleLinear().domain([0, most]).range([MARGIN_LEFT, WIDTH - 90]);
    const y = d3.scaleBand().domain(d3.range(rows.length)).range([18, rows.length * band + 18]).padding(0.18);
    const ticks = format === seconds ? timeTicks(0, most, 8) : { values: x.ticks(8), format: tick(format) };
    axis(svg, d3.axisBottom(x).tickValues(ticks.values).tickFormat(ticks.format).tickSize(-(rows.length * band)),
      [0, rows.length * band + 18], title).select('.domain').remove();
    rows.forEach((row, r) => {
      const group = svg.append('g');
      let at = 0;
      row.parts.forEach((value, k) => {
        if (!(value > 0)) return;
        const left = x(at);
        const width = x(at + value) - left;
        group.append('rect').attr('class', `bar ${keys[k].kind}`).attr('x', left).attr('y', y(r))
          .attr('width', Math.max(0.5, width - (width > 3 ? 1 : 0))).attr('height', y.bandwidth())
          .append('title').text(`${row.name}, ${keys[k].name}: ${format(value)}`);
        at += value;
      });
      group.append('text').attr('class', 'row-name').attr('x', MARGIN_LEFT - 10).attr('text-anchor', 'end')
        .attr('y', y(r) + y.bandwidth() / 2).attr('dy', '0.35em').text(row.name);
      group.append('text').attr('class', 'row-value').attr('x', x(at) + 6)
        .attr('y', y(r) + y.bandwidth() / 2).attr('dy', '0.35em').text(row.value || format(at));
    });
    if (marker) {
      svg.append('line').attr('class', 'marker').attr('x1', x(marker.at)).attr('x2', x(marker.at))
        .attr('y1', 12).attr('y2', rows.length * band + 18);
      svg.append('text').attr('class', 'marker-name').attr('x', x(marker.at)).attr('y', 9)
        .attr('text-anchor', 'middle').text(marker.name);
    }
    return svg;
  }

  /// Lines through points. series: [{name, kind, points: [{x, y, text, hollow}]}].
  function lines({ label, series, x, y, xFormat, yFormat, xTicks, yTicks, yTitle, xTitle, height = 300, base }) {
    const svg = chart(label, height);
    x.range([70, WIDTH - 170]);
    y.range([height - 46, 24]);
    axis(svg, d3.axisBottom(x).tickValues(xTicks).tickFormat(xFormat), [0, height - 46], null);
    svg.append('text').attr('class', 'axis-title').attr('x', WIDTH - 170).attr('y', height - 8).attr('text-anchor', 'end').text(xTitle);
    axis(svg, d3.axisLeft(y).tickValues(yTicks || y.ticks(6)).tickFormat(tick(yFormat)).tickSize(-(WIDTH - 240)), [70, 0], null)
      .select('.domain').remove();
    svg.append('text').attr('class', 'axis-title').attr('x', 0).attr('y', 12).text(yTitle);
    if (base) {
      svg.append('path').attr('class', 'reference').attr('d', `M${base.map(([a, b]) => `${x(a)},${y(b)}`).join('L')}`);
    }
    let last = -100;
    for (const s of [...series].sort((a, b) => y(a.points[a.points.length - 1].y) - y(b.points[b.points.length - 1].y))) {
      svg.append('path').attr('class', `line ${s.kind}`).attr('d', `M${s.points.map((p) => `${x(p.x)},${y(p.y)}`).join('L')}`);
      for (const p of s.points) {
        const point = s.square
          ? svg.append('rect').attr('x', x(p.x) - 4.5).attr('y', y(p.y) - 4.5).attr('width', 9).attr('height', 9)
          : svg.append('circle').attr('cx', x(p.x)).attr('cy', y(p.y)).attr('r', 5);
        point.attr('class', `point ${s.kind}${p.hollow ? ' hollow' : ''}`).append('title').text(`${s.name}: ${p.text}`);
      }
      const end = s.points[s.points.length - 1];
      last = Math.max(y(end.y), last + 16);
      svg.append('text').attr('class', 'line-name').attr('x', x(end.x) + 12).attr('y', last).attr('dy', '0.35em').text(s.name);
    }
    return svg;
  }

  // ---- sections

  const PHASES = [
    { key: 'forward', name: 'forward', kind: 'forward' },
    { key: 'backward', name: 'backward', kind: 'backward' },
    { key: 'weight', name: 'weight gradients', kind: 'weight' },
    { key: 'overlapped', name: 'overlapped F&B', kind: 'overlapped' },
    { key: 'exposed_communication', name: 'exposed communication', kind: 'communication' },
    { key: 'optimizer', name: 'optimizer', kind: 'optimizer' },
    { key: 'bubble', name: 'bubble', kind: 'bubble' },
  ];
  const MEMORY = [
    { key: 'parameters', name: 'parameters', kind: 'forward' },
    { key: 'gradients', name: 'gradients', kind: 'backward' },
    { key: 'optimizer_state', name: 'optimizer state', kind: 'weight' },
    { key: 'activations', name: 'activations', kind: 'overlapped' },
    { key: 'workspace', name: 'workspace', kind: 'optimizer' },
    { key: 'communication_buffers', name: 'communication buffers', kind: 'communication' },
  ];

  /// The first rank of each pipeline position.
  function positions(ranks) {
    const seen = new Set();
    return ranks.filter((rank) => !seen.has(rank.position) && seen.add(rank.position));
  }
  function positionName({ position, stages }) {
    const shown = stages.length > 3 ? `${stages.slice(0, 2).join(', ')} \u2026 ${stages[stages.length - 1]}` : stages.join(', ');
    return `${position}: stage${stages.length > 1 ? 's' : ''} ${shown}`;
  }

  const VERDICTS = {
    met: ['\u2713', 'Yes', 'good'],
    met_closely: ['\u2248', 'Probably', 'close'],
    missed_closely: ['\u2248', 'Probably not', 'close'],
    missed: ['\u2717', 'No', 'bad'],
  };

  /// Range, value and aim on one line.
  function bullet(t) {
    const height = 50;
    const svg = chart(`${t.quantity}: ${targetValue(t.quantity, t.value)}, from ${targetValue(t.quantity, t.low)} to `
      + `${targetValue(t.quantity, t.high)}; asked for ${t.at_least ? 'at least' : 'at most'} ${targetValue(t.quantity, t.aim)}`, height);
    const low = Math.min(t.low, t.aim);
    const high = Math.max(t.high, t.aim);
    const pad = 0.12 * (high - low) || 0.05 * high;
    const x = d3.scaleLinear().domain([Math.max(0, low - pad), high + pad]).range([20, WIDTH - 20]);
    const reach = t.at_least ? [x(t.aim), WIDTH - 20] : [20, x(t.aim)];
    svg.append('rect').attr('class', 'bullet-good').attr('x', reach[0]).attr('width', Math.max(0, reach[1] - reach[0])).attr('y', 16).attr('height', 12);
    svg.append('line').attr('class', 'bullet-base').attr('x1', 20).attr('x2', WIDTH - 20).attr('y1', 28.5).attr('y2', 28.5);
    svg.append('rect').attr('class', 'bullet-range').attr('x', x(t.low)).attr('width', Math.max(2, x(t.high) - x(t.low))).attr('y', 18).attr('height', 8);
    svg.append('circle').attr('class', 'bullet-value').attr('cx', x(t.value)).attr('cy', 22).attr('r', 6);
    svg.append('line').attr('class', 'bullet-aim').attr('x1', x(t.aim)).attr('x2', x(t.aim)).attr('y1', 10).attr('y2', 34);
    const text = (at, y, words) => svg.append('text').attr('class', 'bullet-text').attr('x', Math.min(WIDTH - 90, Math.max(90, at)))
      .attr('y', y).attr('text-anchor', 'middle').text(words);
    text(x(t.aim), 45, `asked: ${targetValue(t.quantity, t.aim)}`);
    text(x(t.value), 9, targetValue(t.quantity, t.value));
    return svg;
  }

  function figures(scenario) {
    const r = scenario.report;
    const peak = Math.max(...r.ranks.map((_, i) => r.memory_peak_bytes.per_stage[i].peak));
    const item = (name, value, note) => element('div', { class: 'figure' },
      element('dt', {}, name), element('dd', {}, value, note ? element('span', { class: 'note' }, note) : null));
    const u = r.uncertainty;
    const step = item('step time', seconds(r.step_time_s), u ? `${seconds(u.step_time_s.p10)} to ${seconds(u.step_time_s.p90)} (8 of 10)`
      : scenario.sensitivity && scenario.sensitivity.spread > 0 ? `\u00b1\u202f${percent(scenario.sensitivity.spread)}, one spread of the prices` : null);
    return element('dl', { class: 'figures' }, step,
      item('tokens a day', count(r.tokens_per_day), `${count(r.tokens_per_step)} a step`),
      item('tokens/s/GPU', digits(r.tokens_per_s_per_gpu)),
      item('MFU, causal', percent(r.mfu_causal), `${percent(r.mfu_noncausal)} non-causal, of ${digits(r.peak_flops_per_s / 1e12)}\u202fTFLOP/s`),
      item('GPU-hours for 10\u00b9\u00b2 tokens', count(r.gpu_hours_per_trillion_tokens)),
      item('memory at its peak', bytes(peak), `of ${bytes(r.memory_peak_bytes.capacity)}, ${percent(peak / r.memory_peak_bytes.capacity, 0)}`),
      scenario.run ? item(`${count(scenario.run.tokens)} tokens take`, `${digits(scenario.run.days)} days`, `${count(scenario.run.gpu_hours)} GPU-hours`) : null,
      scenario.run && scenario.run.cost_usd ? item('and cost', usd(scenario.run.cost_usd)) : null);
  }

  function answer(scenario) {
    const r = scenario.report;
    const box = element('section', { id: 'answer', class: 'answer', 'aria-labelledby': 'answer-title' });
    const targets = scenario.targets || [];
    box.append(element('h2', { id: 'answer-title' }, targets.length > 1 ? 'The answers' : 'The answer'));
    for (const t of targets) {
      const [mark, word, kind] = VERDICTS[t.verdict];
      box.append(element('div', { class: `verdict ${kind}` },
        element('p', {}, element('span', { class: 'mark', 'aria-hidden': 'true' }, mark),
          element('strong', {}, word), ` \u2014 ${t.target}`),
        element('p', { class: 'because' }, `${targetValue(t.quantity, t.value)}, ${percent(Math.abs(t.margin))} `
          + `${t.margin >= 0 ? 'better than' : 'short of'} what is asked.`
          + (t.high > t.low ? ` With what is known of the errors, ${targetValue(t.quantity, t.low)} to ${targetValue(t.quantity, t.high)}.` : '')),
        figure(bullet(t))));
    }
    if (targets.length === 0) {
      box.append(element('p', { class: 'headline' }, `A step takes ${seconds(r.step_time_s)}: ${count(r.tokens_per_day)} tokens a day on ${count(r.gpus)} GPU${r.gpus === 1 ? '' : 's'}.`));
    }
    box.append(figures(scenario));
    const checks = [];
    const misfits = r.ranks.filter((_, i) => r.memory_peak_bytes.per_stage[i].peak > r.memory_peak_bytes.capacity);
    if (misfits.length) checks.push(`It does not fit: ${misfits.length} of ${r.ranks.length} ranks need more memory than the GPU has.`);
    for (const run of (data.validation ? data.validation.runs : [])) {
      const row = run.scenario === r.scenario && run.rows.find((one) => one.quantity === 'step_time_s');
      if (row) {
        checks.push(`Against the published step (${row.source}) this model is ${percent(Math.abs(row.error))} `
          + `too ${row.error < 0 ? 'short' : 'long'}${run.name ? ` (${run.name})` : ''}.`);
      }
    }
    const prices = (scenario.assumptions || []).filter((a) => a.group === 'Prices');
    if (prices.length) checks.push(`Op time by where its price is from: ${prices.map((a) => `${a.what} ${percent(a.share, 0)}`).join(', ')}.`);
    if (targets.some((t) => t.high > t.low)) {
      checks.unshift('Errors that ranges allow for: two spreads of the prices'
        + (data.validation ? ', the largest error of a step against a published one' : '') + (data.reliability ? ', and goodput in 8 of 10 runs.' : '.'));
    }
    if (checks.length) box.append(element('ul', { class: 'checks' }, ...checks.map((text) => element('li', {}, text))));
    return box;
  }

  function compared() {
    if (data.scenarios.length < 2) return null;
    const rows = data.scenarios.map(({ report: r, targets }) => [r.scenario, count(r.gpus), seconds(r.step_time_s), count(r.tokens_per_day),
      digits(r.tokens_per_s_per_gpu), percent(r.mfu_causal), count(r.gpu_hours_per_trillion_tokens),
      bytes(r.memory_peak_bytes.overall), (targets || []).map((t) => VERDICTS[t.verdict].slice(0, 2).join(' ')).join(', ')]);
    const svg = stackedBars({ label: 'Steps of the scenarios, by phase', keys: PHASES, format: seconds, title: 'mean of GPUs',
      rows: data.scenarios.map(({ report: r }) => ({ name: r.scenario.length > 22 ? `${r.scenario.slice(0, 21)}\u2026` : r.scenario,
        parts: PHASES.map((p) => r.phases_s[p.key]) })) });
    return section('compare', 'The scenarios side by side', null, figure(svg, legend(PHASES)),
      table('Scenarios', [['Scenario'], ['GPUs', 1], ['step', 1], ['tokens/day', 1], ['tokens/s/GPU', 1], ['MFU', 1], ['GPU-h/10\u00b9\u00b2', 1], ['memory', 1], ['targets']], rows));
  }

  function phases({ report: r }) {
    const ranks = positions(r.ranks);
    const rows = [{ name: 'mean of GPUs', parts: PHASES.map((p) => r.phases_s[p.key]) },
      ...ranks.map((rank) => ({ name: positionName(rank), parts: PHASES.map((p) => rank.phases_s[p.key]) }))];
    for (const row of rows) row.value = percent((row.parts[6] + row.parts[4]) / r.step_time_s) + ' idle';
    const svg = stackedBars({ label: `Phases of the step by pipeline position. Mean: ${PHASES.map((p) => `${p.name} ${seconds(r.phases_s[p.key])}`).join(', ')}`,
      rows, keys: PHASES, format: seconds, title: 'time' });
    const exposed = r.exposed_by_s;
    const words = exposed && sum(Object.values(exposed)) > 0
      ? `Exposed: ${Object.entries(exposed).filter(([, s]) => s > 0.0005 * r.step_time_s).map(([what, s]) => `${({ expert: 'expert exchange', tensor: 'tensor parallel', data: 'gradients and parameters', pipeline: 'sends between stages' })[what]} ${seconds(s)}`).join(', ')} a GPU.` : null;
    return section('phases', 'Where the step goes',
      'Each pipeline position’s step, cut without overlap. Idle is what no kernel computes in: bubble and exposed communication.',
      figure(svg, legend(PHASES.filter((p) => r.phases_s[p.key] > 0).map((p) => ({ ...p, value: percent(r.phases_s[p.key] / r.step_time_s) })))),
      words ? element('p', {}, words) : null,
      tableBehind('Phases by pipeline position, seconds', [['Position'], ...PHASES.map((p) => [p.name, 1])],
        rows.map((row) => [row.name, ...row.parts.map((s) => s.toFixed(3))])));
  }

  function memory({ report: r }) {
    const byRank = new Map(r.memory_peak_bytes.per_stage.map((m) => [m.rank, m]));
    const rows = positions(r.ranks).map((rank) => {
      const m = byRank.get(rank.rank);
      return { name: positionName(rank), parts: MEMORY.map((k) => m.at_peak[k.key] || 0), m };
    });
    const capacity = r.memory_peak_bytes.capacity;
    for (const row of rows) row.value = `${bytes(row.m.peak)}${row.m.peak > capacity ? ' too much' : ''}`;
    const svg = stackedBars({ label: `Memory at its peak by pipeline position, of ${bytes(capacity)}`, rows, keys: MEMORY, format: bytes,
      title: 'at the peak', marker: { at: capacity, name: `capacity ${bytes(capacity)}` } });
    const fullest = rows.reduce((a, b) => (a.m.peak >= b.m.peak ? a : b));
    return section('memory', 'Memory of each stage',
      `Fullest is position ${fullest.name}, with ${bytes(fullest.m.peak)} ${seconds(fullest.m.at_s)} into the step, in ${fullest.m.in}. Allocators’ fragmentation is not counted.`,
      figure(svg, legend(MEMORY)),
      tableBehind('Memory at its peak by pipeline position', [['Position'], ['peak', 1], ...MEMORY.map((k) => [k.name, 1])],
        rows.map((row) => [row.name, bytes(row.m.peak), ...row.parts.map(bytes)])));
  }

  function network({ report: r }) {
    const tiers = r.network.tiers || [];
    if (tiers.length === 0) return null;
    const band = 46;
    const height = tiers.length * band + 34;
    const svg = chart(`Use of links by tier: ${tiers.map((t) => `${t.tier} ${percent(t.mean_use)}, busiest ${percent(t.busiest_use)}`).join('; ')}`, height);
    const x = d3.scaleLinear().domain([0, 1]).range([MARGIN_LEFT, WIDTH - 60]);
    axis(svg, d3.axisBottom(x).ticks(10).tickFormat((v) => percent(v, 0)).tickSize(-tiers.length * band), [0, tiers.length * band + 8],
      'of what links can carry').select('.domain').remove();
    tiers.forEach((tier, i) => {
      const top = i * band + 12;
      svg.append('text').attr('class', 'row-name').attr('x', MARGIN_LEFT - 10).attr('y', top + 18).attr('text-anchor', 'end').text(tier.tier);
      const bar = (value, at, kind, name) => {
        svg.append('rect').attr('class', `bar ${kind}`).attr('x', x(0)).attr('y', at).attr('width', Math.max(1, x(Math.min(1, value)) - x(0))).attr('height', 14);
        svg.append('text').attr('class', 'row-value').attr('x', x(Math.min(1, value)) + 6).attr('y', at + 11).text(`${percent(value)} ${name}`);
      };
      bar(tier.mean_use, top, 'overlapped', 'mean');
      bar(tier.busiest_use, top + 17, 'forward', 'busiest');
    });
    return section('network', 'How full the network is',
      `${r.network.fabric}. Ops lost ${seconds(r.network.stretched_s)} a GPU to links and GPUs that they shared.`,
      figure(svg),
      table('Links by tier', [['Tier'], ['links', 1], ['mean use', 1], ['busiest', 1], ['busiest link'], ['ops held up', 1], ['most at']],
        tiers.map((t) => [t.tier, count(t.links), percent(t.mean_use), percent(t.busiest_use), t.busiest, t.held_back_s > 0 ? seconds(t.held_back_s) : '\u2013', t.limiting || '\u2013'])));
  }

  function scaling({ report: r, scaling: s }) {
    if (!s) return null;
    const curves = [['growing_batch', 'batch grows', 'forward'], ['same_batch', 'same batch', 'backward']]
      .map(([key, name, kind]) => ({ key, name, kind, square: key === 'same_batch', points: s[key].points })).filter((c) => c.points.length > 1);
    if (curves.length === 0) return null;
    const all = curves.flatMap((c) => c.points);
    const sizes = [...new Set(all.map((p) => p.gpus))].sort((a, b) => a - b);
    const ticks = sizes.filter((g, i) => i === 0 || g / sizes[i - 1] > 1.2);
    const point = (p, y, text) => ({ x: p.gpus, y, hollow: p.network !== 'flows', text });
    const x = () => d3.scaleLog().domain([sizes[0], sizes[sizes.length - 1]]);
    const least = 0.85 * Math.min(...all.map((p) => p.tokens_per_day));
    const most = 1.15 * Math.max(...all.map((p) => p.tokens_per_day), r.tokens_per_day * sizes[sizes.length - 1] / r.gpus);
    const rate = lines({ label: 'Tokens a day against GPUs', x: x(), xTicks: ticks, xFormat: count, yFormat: count,
      y: d3.scaleLog().domain([least, most]), yTicks: d3.range(-1, 20).flatMap((e) => [1, 2, 5].map((m) => m * 10 ** e)).filter((v) => v >= least && v <= most),
      yTitle: 'tokens a day (dotted: in proportion to the GPUs)', xTitle: 'GPUs',
      base: [[sizes[0], r.tokens_per_day * sizes[0] / r.gpus], [sizes[sizes.length - 1], r.tokens_per_day * sizes[sizes.length - 1] / r.gpus]],
      series: curves.map((c) => ({ ...c, points: c.points.map((p) => point(p, p.tokens_per_day, `${count(p.gpus)} GPUs, ${count(p.tokens_per_day)} tokens/day`)) })) });
    const efficiency = lines({ label: 'Efficiency against GPUs', x: x(), xTicks: ticks, xFormat: count, yFormat: (v) => percent(v, 0), height: 240,
      y: d3.scaleLinear().domain([Math.min(0.5, ...all.map((p) => p.efficiency)), Math.max(1, ...all.map((p) => p.efficiency))]).nice(),
      yTitle: `tokens/s/GPU, of those on ${count(r.gpus)} GPUs`, xTitle: 'GPUs',
      series: curves.map((c) => ({ ...c, points: c.points.map((p) => point(p, p.efficiency, `${count(p.gpus)} GPUs, ${percent(p.efficiency)}`)) })) });
    const gaps = curves.flatMap((c) => s[c.key].left_out.map((gap) => `${count(gap.gpus)} GPUs, ${c.name}: ${gap.why}`));
    const misfit = all.some((p) => !p.fits);
    return section('scaling', 'More GPUs, or fewer',
      'The same plan with more or fewer data-parallel copies. With the same global batch, pipelines get fewer micro-batches and run dry; a batch that grows changes the training.'
        + (all.some((p) => p.network !== 'flows') && r.network.fidelity === 'flows' ? ' Hollow points have more nodes than the fabric that is described: transfers by formula, and as much longer as sharing makes the plan’s own step.' : ''),
      figure(rate), figure(efficiency),
      gaps.length ? element('details', {}, element('summary', {}, `${gaps.length} sizes do not come out`), element('ul', {}, ...gaps.map((g) => element('li', {}, g)))) : null,
      tableBehind('Scaling', [['GPUs'], ['batch'], ['DP', 1], ['sequences a step', 1], ['micro-batches', 1], ['step', 1], ['tokens/day', 1], ['efficiency', 1], ['memory', 1], ['network']],
        curves.flatMap((c) => c.points.map((p) => [count(p.gpus), c.name, count(p.dp), count(p.global_batch), count(p.micro_batches), seconds(p.step_time_s), count(p.tokens_per_day), percent(p.efficiency), `${bytes(p.memory_peak_bytes)}${p.fits ? '' : ' too much'}`, p.network]))),
      misfit ? element('p', {}, 'Some of these sizes need more memory than the GPU has; the table says which.') : null);
  }

  function tornado({ report: r, sensitivity: s }) {
    const u = r.uncertainty;
    if (!u && !s) return null;
    const step = r.step_time_s;
    const rows = (u ? u.tornado.map((t) => ({ name: t.family, low: t.step_p10_s, high: t.step_p90_s, share: t.share, spread: t.spread }))
      : s.rows.map((t) => ({ name: t.kind, low: t.faster_s, high: t.slower_s, share: t.share, spread: t.spread, by: t.by_spread_s })))
      .filter((t) => Math.abs(t.high - t.low) > 1e-5 * step);
    const shown = rows.slice(0, 14);
    if (shown.length === 0) return null;
    const band = 24;
    const height = shown.length * band + 46;
    const svg = chart(`Which prices the step hangs on: ${shown.slice(0, 4).map((t) => `${t.name} ${signed(t.low / step - 1)} to ${signed(t.high / step - 1)}`).join('; ')}`, height);
    const most = Math.max(...shown.map((t) => Math.max(step - t.low, t.high - step))) * 1.15;
    const x = d3.scaleLinear().domain([-most / step, most / step]).range([250, WIDTH - 80]);
    axis(svg, d3.axisBottom(x).ticks(9).tickFormat(signed).tickSize(-shown.length * band), [0, shown.length * band + 18], 'of the step', 240).select('.domain').remove();
    shown.forEach((t, i) => {
      const y = 20 + i * band;
      const bar = (from, to, kind) => svg.append('rect').attr('class', `bar ${kind}`).attr('x', Math.min(x(from), x(to))).attr('y', y)
        .attr('width', Math.max(0.5, Math.abs(x(to) - x(from)))).attr('height', band - 7);
      bar(0, t.low / step - 1, 'weight').append('title').text(`${t.name}, faster: ${seconds(t.low)}`);
      bar(0, t.high / step - 1, 'backward').append('title').text(`${t.name}, slower: ${seconds(t.high)}`);
      svg.append('text').attr('class', 'row-name').attr('x', 240).attr('y', y + 12).attr('text-anchor', 'end').text(t.name.replace(/_/g, ' '));
      svg.append('text').attr('class', 'row-value').attr('x', x(Math.max(0, t.high / step - 1)) + 6).attr('y', y + 12).text(signed(t.high / step - 1));
    });
    svg.append('line').attr('class', 'zero').attr('x1', x(0)).attr('x2', x(0)).attr('y1', 14).attr('y2', shown.length * band + 18);
    const lead = u ? `${u.draws} draws of the prices’ errors: a step of ${seconds(u.step_time_s.p10)} to ${seconds(u.step_time_s.p90)} in 8 of 10. Bars: one family’s prices between their fastest and slowest tenth.`
      : `Every kind of operation ${percent(s.change, 0)} faster and slower, the whole step simulated again each time: what hides behind something else hardly counts. With the spreads that prices state, kinds erring independently, the step is known to \u00b1\u202f${percent(s.spread)} (one spread).`;
    return section('sensitivity', 'What the step hangs on', lead,
      figure(svg, legend([{ name: 'faster', kind: 'weight' }, { name: 'slower', kind: 'backward' }])),
      tableBehind('Sensitivity of the step', [['Operations'], ['of op time', 1], ['spread of prices', 1], ['faster', 1], ['slower', 1]],
        rows.map((t) => [t.name, percent(t.share), percent(t.spread), seconds(t.low), seconds(t.high)])));
  }

  function costliest({ report: r }) {
    const rows = r.prices.slice(0, 15).map((p) => [p.label, p.shape, count(p.count), seconds(p.time_s), percent(p.share), p.source + (p.extrapolated ? '*' : ''), percent(p.spread, 0), p.note]);
    return section('prices', 'Costliest operations', 'Of all shapes of the step, by time on all GPUs, overlapped or not. * outside the measured range.',
      table('Costliest shapes', [['Op'], ['Shape'], ['a step, all GPUs', 1], ['each', 1], ['of op time', 1], ['price is'], ['spread', 1], ['from']], rows));
  }

  /// "TP 4, PP 4, DP 2, ZeRO 1, interleaved_1f1b x5": what is 1 or nothing is left out.
  function layoutWords(c) {
    const p = c.plan;
    if (!p) return c.candidate;
    const degrees = [['TP', p.tp], ['CP', p.cp], ['PP', p.pp], ['DP', p.dp], ['EP', p.ep], ['expert TP', p.expert_tp]]
      .filter(([, n]) => n > 1).map(([name, n]) => `${name} ${n}`);
    return [...degrees, `ZeRO ${p.zero}`, p.schedule + (p.stages_per_rank > 1 ? ` x${p.stages_per_rank}` : ''), `micro-batch ${p.micro_batch}`,
      p.precision, p.recompute && p.recompute !== 'none' ? `recompute ${p.recompute}` : null, p.communication_sms ? `${p.communication_sms} SMs` : null]
      .filter(Boolean).join(', ');
  }

  function search() {
    const s = data.search;
    if (!s) return null;
    const timed = (list) => (list || []).filter((c) => c.step_time_s);
    const front = timed(s.time_and_memory);
    const best = timed(s.best);
    const points = new Map([...front, ...best].map((c) => [c.candidate, c]));
    const own = s.own && s.own.step_time_s ? s.own : null;
    const all = [...points.values(), ...(own ? [own] : [])];
    if (all.length === 0) return null;
    const height = 360;
    const svg = chart(`Layouts by step time and memory: ${front.length} on the front`, height);
    const pad = (low, high) => [low - 0.06 * (high - low || low), high + 0.06 * (high - low || high)];
    const x = d3.scaleLinear().domain(pad(Math.min(...all.map((c) => c.step_time_s)), Math.max(...all.map((c) => c.step_time_s)))).nice().range([80, WIDTH - 40]);
    const y = d3.scaleLinear().domain([0, 1.05 * Math.max(...all.map((c) => c.memory_peak_bytes), s.memory_capacity_bytes || 0)]).range([height - 44, 18]);
    const ticks = timeTicks(...x.domain(), 9);
    axis(svg, d3.axisBottom(x).tickValues(ticks.values).tickFormat(ticks.format), [0, height - 44], null);
    svg.append('text').attr('class', 'axis-title').attr('x', WIDTH - 40).attr('y', height - 8).attr('text-anchor', 'end').text('step time');
    svg.append('text').attr('class', 'axis-title').attr('x', 0).attr('y', 12).text('memory at its peak');
    axis(svg, d3.axisLeft(y).ticks(6).tickFormat(tick(bytes)).tickSize(-(WIDTH - 120)), [80, 0], null).select('.domain').remove();
    if (s.memory_capacity_bytes) {
      svg.append('line').attr('class', 'marker').attr('x1', 80).attr('x2', WIDTH - 40).attr('y1', y(s.memory_capacity_bytes)).attr('y2', y(s.memory_capacity_bytes));
      svg.append('text').attr('class', 'marker-name').attr('x', WIDTH - 40).attr('y', y(s.memory_capacity_bytes) - 5).attr('text-anchor', 'end').text('capacity');
    }
    if (front.length > 1) svg.append('path').attr('class', 'line forward').attr('d', `M${front.map((c) => `${x(c.step_time_s)},${y(c.memory_peak_bytes)}`).join('L')}`);
    for (const c of points.values()) {
      const onFront = front.some((f) => f.candidate === c.candidate);
      svg.append('circle').attr('class', `point ${onFront ? 'forward' : 'overlapped hollow'}`).attr('cx', x(c.step_time_s)).attr('cy', y(c.memory_peak_bytes)).attr('r', 5)
        .append('title').text(`${layoutWords(c)}: ${seconds(c.step_time_s)}, ${bytes(c.memory_peak_bytes)}`);
    }
    if (own) {
      svg.append('rect').attr('class', 'point backward').attr('x', x(own.step_time_s) - 5).attr('y', y(own.memory_peak_bytes) - 5).attr('width', 10).attr('height', 10)
        .append('title').text(`the scenario’s own: ${seconds(own.step_time_s)}, ${bytes(own.memory_peak_bytes)}`);
      svg.append('text').attr('class', 'line-name').attr('x', x(own.step_time_s)).attr('y', y(own.memory_peak_bytes) + 20).attr('text-anchor', 'middle').text('own plan');
    }
    const row = (c, name) => [name, layoutWords(c), count(c.gpus), seconds(c.step_time_s), own ? signed(c.step_time_s / own.step_time_s - 1) : '\u2013', bytes(c.memory_peak_bytes), count(c.gpu_hours_per_trillion_tokens), c.full ? 'simulated' : 'coarse'];
    const columns = [['Place'], ['Layout'], ['GPUs', 1], ['step', 1], ['against own', 1], ['memory', 1], ['GPU-h/10\u00b9\u00b2', 1], ['known']];
    const why = (list, name) => (list && list.length ? element('p', {}, `Against ${name}, the winner saves: ${list.filter((d) => d.other_s - d.winner_s > 1e-4 * d.other_s).slice(0, 4)
      .map((d) => `${d.phase.replace(/_/g, ' ')} ${seconds(d.other_s - d.winner_s)}`).join(', ')}.`) : null);
    return section('search', 'Layouts',
      `${count(s.counts.candidates)} layouts of ${s.scenario}, ${count(s.counts.too_large)} too large for the memory, ${count(s.counts.timed)} timed, ${count(s.counts.simulated)} simulated in full.`
        + (s.certain === false && s.why_uncertain ? ` The ranking is not certain: ${s.why_uncertain}.` : ''),
      figure(svg, legend([{ name: 'nothing is both faster and smaller', kind: 'forward' }, { name: 'among the best', kind: 'overlapped' }, ...(own ? [{ name: 'the scenario’s own plan', kind: 'backward' }] : [])])),
      table('The best layouts', columns, [...best.map((c, i) => row(c, `${c.place || i + 1}${own && c.candidate === own.candidate ? ', own plan' : ''}`)),
          ...(own && !best.some((c) => c.candidate === own.candidate) ? [row(own, own.place ? `own (${own.place})` : 'own')] : [])]),
      timed(s.time_and_gpus).length > 1 ? table('Faster, or on fewer GPUs', columns, timed(s.time_and_gpus).map((c) => row(c, `${count(c.gpus)} GPUs`))) : null,
      why(s.against_second, 'the second'), why(s.against_own, 'the own plan'));
  }

  /// A number, or an interval {p10, p50, p90}; nothing where there is none.
  function known(value, format, scale = 1) {
    if (value === undefined || value === null) return '\u2013';
    if (typeof value === 'number') return format(value * scale);
    return `${format(value.p50 * scale)} (${format(value.p10 * scale)} to ${format(value.p90 * scale)})`;
  }
  const middle = (value) => (value && typeof value === 'object' ? value.p50 : value);

  function budget() {
    const b = data.budget;
    if (!b) return null;
    const row = (name, x, kind) => [name, kind || '', x.gpus ? count(x.gpus) : '', x.tokens ? count(x.tokens) : '', known(x.gpu_hours, count), known(x.wall_s, digits, 1 / 86400), known(x.energy_kwh, count, 1e-3), known(x.cost_usd, usd)];
    const stages = b.stages || [];
    const svg = stages.length > 1 && middle(b.total.gpu_hours) > 0 ? stackedBars({ label: 'GPU-hours by stage', rows: [
      { name: 'GPU-hours', parts: stages.map((s) => middle(s.gpu_hours)) }], keys: stages.map((s, i) => ({ name: s.name, kind: PHASES[[3, 1, 2, 0, 4, 5][i % 6]].kind })), format: count }) : null;
    const a = b.assumptions || {};
    const facts = [a.goodput !== undefined ? `goodput ${percent(a.goodput)}${a.goodput_source ? ` (${a.goodput_source})` : ''}` : null,
      a.usd_per_gpu_hour ? `${a.usd_per_gpu_hour.toFixed(2)} USD a GPU-hour${a.money_source ? ` (${a.money_source})` : ''}` : null,
      a.node_w ? `${count(a.node_w)} W a node, PUE ${a.pue}${a.power_source ? ` (${a.power_source})` : ''}` : null].filter(Boolean);
    return section('budget', 'What the programme costs', `${b.recipe}: ${known(b.total.gpu_hours, count)} GPU-hours, ${known(b.total.wall_s, digits, 1 / 86400)} days${b.total.cost_usd === undefined ? '' : `, ${known(b.total.cost_usd, usd)}`}.`,
      svg ? figure(svg, legend(stages.map((s, i) => ({ name: s.name, kind: PHASES[[3, 1, 2, 0, 4, 5][i % 6]].kind })))) : null,
      table('Budget by stage', [['Stage'], ['kind'], ['GPUs', 1], ['tokens', 1], ['GPU-hours', 1], ['days', 1], ['MWh', 1], ['cost', 1]],
        [...stages.map((s) => row(s.name, s, (s.kind || '').replace(/_/g, ' '))), row('total', b.total)]),
      facts.length ? element('p', {}, `Assumed: ${facts.join('; ')}.`) : null,
      b.published && b.published.length ? table('Against what is published', [['Of'], ['quantity'], ['predicted', 1], ['published', 1], ['error', 1], ['source']],
        b.published.map((p) => [p.of, p.quantity, count(p.predicted), count(p.published), signed(p.error), p.source])) : null);
  }

  const LOST = [
    { key: 'useful', name: 'useful', kind: 'overlapped' }, { key: 'checkpoint', name: 'checkpoints', kind: 'forward' },
    { key: 'rework', name: 'done again', kind: 'backward' }, { key: 'detection', name: 'until noticed', kind: 'optimizer' },
    { key: 'restart', name: 'restarts', kind: 'communication' }, { key: 'waiting', name: 'waiting for hosts', kind: 'bubble' },
    { key: 'maintenance', name: 'maintenance', kind: 'weight' }, { key: 'slow', name: 'slow hosts', kind: 'forward' },
  ];

  function reliability() {
    const g = data.reliability;
    if (!g) return null;
    const parts = LOST.filter((p) => g.mean_s && g.mean_s[p.key] > 0);
    const lost = parts.filter((p) => p.key !== 'useful');
    const svg = lost.length ? stackedBars({ label: 'Time that does not count', rows: [{ name: 'lost, mean', parts: lost.map((p) => g.mean_s[p.key]) }], keys: lost, format: seconds, title: 'of calendar time' }) : null;
    return section('reliability', 'Failures and goodput',
      `On ${count(g.gpus)} GPUs something stops the job every ${seconds(g.mtbf_s)}. Goodput ${percent(g.goodput.p50)} (${percent(g.goodput.p10)} to ${percent(g.goodput.p90)} in 8 of 10 of ${count(g.trials)} simulated runs): ${seconds(g.useful_s)} of training take ${seconds(g.calendar_s.p50)} (${seconds(g.calendar_s.p10)} to ${seconds(g.calendar_s.p90)}).`,
      svg ? figure(svg, legend(lost.map((p) => ({ ...p, value: seconds(g.mean_s[p.key]) })))) : null,
      g.checkpoint ? element('p', {}, `Checkpoints of ${bytes(g.checkpoint.bytes)}, one every ${seconds(g.checkpoint.interval_s)}; the best interval is ${seconds(g.checkpoint.optimum_s)}.`) : null,
      g.failures && g.failures.length ? table('What fails', [['Kind'], ['one every', 1], ['in the run', 1]], g.failures.slice(0, 12).map((f) => [f.what, seconds(f.mtbf_s), digits(f.events)])) : null);
  }

  function validation() {
    const v = data.validation;
    if (!v || v.runs.length === 0) return null;
    const rows = v.runs.flatMap((run) => run.rows.map((row) => ({ run, row })));
    const met = rows.filter(({ row }) => row.met).length;
    const value = (row, key) => (/_s$|^cell\.|^phase\.|cells_s/.test(row.quantity) ? seconds(row[key]) : count(row[key]));
    return section('validation', 'Predicted against published', `${met} of ${rows.length} rows within their aim. No constant is fitted to a run that it is checked against.`,
      table('Validation', [['Run'], ['quantity'], ['predicted', 1], ['published', 1], ['error', 1], ['aim', 1], ['verdict'], ['source']],
        rows.map(({ run, row }) => [row === run.rows[0] ? run.name : null, row.quantity, value(row, 'predicted'), value(row, 'published'), signed(row.error), percent(row.aim, 0), row.met ? '\u2713\u00a0met' : '\u2717\u00a0missed', row.note ? `${row.source} (${row.note})` : row.source])));
  }

  function measured({ measured: m }) {
    if (!m) return null;
    const j = m.joined;
    return section('measured', 'Simulated against measured',
      `${m.file}: the step took ${seconds(j.measured_step_s)}, simulated ${seconds(j.predicted_step_s)} (${signed(j.predicted_step_s / j.measured_step_s - 1)}).`,
      table('Ops by kind, both timelines', [['Kind'], ['ops', 1], ['predicted', 1], ['measured', 1], ['error', 1], ['median of shapes', 1]],
        j.kinds.map((k) => [k.what.replace(/_/g, ' '), count(k.ops), seconds(k.predicted_s), seconds(k.measured_s), signed(k.error), percent(k.median_error)])));
  }

  function assumptions({ assumptions: list }) {
    if (!list || list.length === 0) return null;
    let last = '';
    const rows = list.map((a) => {
      const group = a.group === last ? null : a.group;
      last = a.group;
      return a.source ? [group, a.what, a.value, a.source] : [group, a.what, a.value];
    });
    return section('assumptions', 'What this rests on', 'Every figure that prices are made of cites where it is from.',
      table('Assumptions and their sources', [['Of'], ['What'], ['Value'], ['Source']], rows));
  }

  // ---- the timeline

  /// A column of whole numbers: base64 of gzip of zigzag LEB128.
  async function unpack(text) {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
    const raw = new Uint8Array(await new Response(stream).arrayBuffer());
    let size = 0;
    for (let i = 0; i < raw.length; ++i) size += raw[i] < 128;
    const column = new Int32Array(size);
    for (let i = 0, n = 0; i < raw.length; ++n) {
      let value = 0;
      let scale = 1;
      while (raw[i] >= 128) {
        value += (raw[i++] - 128) * scale;
        scale *= 128;
      }
      value += raw[i++] * scale;
      column[n] = value % 2 ? -(value + 1) / 2 : value / 2;
    }
    return column;
  }
  async function unpackLevel(level) {
    const names = Object.keys(level || {});
    const columns = await Promise.all(names.map((name) => unpack(level[name])));
    return Object.fromEntries(names.map((name, i) => [name, columns[i]]));
  }
  /// Starts and ends of entries [first, last) of one lane.
  function placed(level, first, last, more) {
    const start = new Int32Array(last - first);
    const end = new Int32Array(last - first);
    let at = 0;
    for (let i = first; i < last; ++i) {
      start[i - first] = at + level.gap[i];
      at = end[i - first] = start[i - first] + level.duration[i];
    }
    const lane = { start, end };
    for (const name of more) lane[name] = level[name].subarray(first, last);
    return lane;
  }

  const LANES = [ // of a row, by stream, top to bottom
    { streams: ['compute', 'weight_gradient'], name: 'computation', height: 0.46 },
    { streams: ['expert_exchange', 'tensor'], name: 'exchanges', height: 0.28 },
    { streams: ['send_next', 'send_previous', 'receive_previous', 'receive_next', 'data', 'storage'], name: 'sends and gradients', height: 0.26 },
  ];
  /// What a phase is coloured by.
  function kindOf(phase) {
    if (/^(PP|dispatch|combine|gradient|parameter|tensor|checkpoint)/.test(phase)) return 'communication';
    if (/^optimizer/.test(phase)) return 'optimizer';
    const direction = /\((.)\)/.exec(phase);
    return { F: 'forward', B: 'backward', W: 'weight' }[direction ? direction[1] : ''] || 'bubble';
  }
  const CELL_KINDS = { forward: 'forward', backward: 'backward', backward_input: 'backward', weight: 'weight', overlapped: 'overlapped', optimizer: 'optimizer' };

  class Rows {
    /// All levels of one timeline, unpacked.
    static async of(timeline, report, name) {
      const [cell, phase, op] = await Promise.all([timeline.cell, timeline.phase, timeline.op].map(unpackLevel));
      const rows = [];
      let atCell = 0;
      let atPhase = 0;
      let atOp = 0;
      for (const row of timeline.rows) {
        const rank = report.ranks.find((r) => r.rank === row.rank);
        const made = { name, rank, cells: placed(cell, atCell, atCell + row.cells, ['kind', 'stage', 'pair_stage', 'micro_batch', 'pair_micro_batch']), lanes: [] };
        atCell += row.cells;
        for (const lane of row.lanes) {
          made.lanes.push({ stream: lane.stream, track: LANES.findIndex((l) => l.streams.includes(lane.stream)),
            phases: placed(phase, atPhase, atPhase + lane.phases, ['phase', 'layer', 'stage', 'micro_batch', 'ops']),
            ops: op.gap ? placed(op, atOp, atOp + lane.ops, ['shape']) : null });
          atPhase += lane.phases;
          atOp += lane.ops;
        }
        rows.push(made);
      }
      return { rows, timeline };
    }
  }

  /// Index of the first entry that ends after `time`.
  function firstAfter(end, time) {
    let low = 0;
    let high = end.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (end[middle] > time) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  class Timeline {
    constructor(scenario) {
      this.scenario = scenario;
      this.unit = scenario.timeline.unit_s;
      this.step = scenario.timeline.step * this.unit;
      this.whole = this.step;
      this.from = 0;
      this.to = this.step;
      this.selected = null;
      this.row = 0;
      this.rowHeight = 40;
      this.left = 118;
      this.top = 26;
      this.canvas = element('canvas', { tabindex: '0', role: 'application', 'aria-label': 'Timeline of the step', 'aria-describedby': 'timeline-help', 'aria-roledescription': 'zoomable timeline' });
      this.status = element('p', { class: 'timeline-status', role: 'status', 'aria-live': 'polite' });
      this.window = element('span', { class: 'timeline-window' });
      const button = (label, text, act) => element('button', { type: 'button', 'aria-label': label, title: label, onclick: act }, text);
      this.controls = element('div', { class: 'controls', role: 'toolbar', 'aria-label': 'Timeline' },
        button('Zoom in', '+', () => this.zoom(0.5)), button('Zoom out', '\u2212', () => this.zoom(2)),
        button('Earlier', '\u2190', () => this.pan(-0.25)), button('Later', '\u2192', () => this.pan(0.25)),
        button('The whole step', 'whole step', () => this.show(0, this.whole)),
        button('One micro-batch in steady state', 'one cell', () => this.showCell()), this.window);
      this.node = element('div', { class: 'timeline' }, this.controls, element('div', { class: 'scroll canvas-box' }, this.canvas), this.status);
      this.listen();
    }

    async load() {
      const levels = [await Rows.of(this.scenario.timeline, this.scenario.report, 'simulated')];
      if (this.scenario.measured) levels.push(await Rows.of(this.scenario.measured.timeline, this.scenario.report, 'measured'));
      this.rows = levels[0].rows.flatMap((_, i) => levels.map((level) => ({ ...level.rows[i], timeline: level.timeline }))
        .filter((row) => row.cells.start.length > 0));
      this.both = levels.length > 1;
      this.whole = Math.max(...levels.map((level) => level.timeline.step * level.timeline.unit_s));
      if (this.rows.length > 24) this.rowHeight = 26;
      new ResizeObserver(() => this.resize()).observe(this.node);
      matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.resize());
      addEventListener('beforeprint', () => this.resize(true));
      addEventListener('afterprint', () => this.resize());
      this.resize();
      this.show(0, this.whole);
      this.canvas.dataset.ready = 'true';
    }

    resize(print) {
      this.width = Math.max(640, this.node.clientWidth || 640);
      this.height = this.top + this.rows.length * this.rowHeight + 4;
      this.ratio = print ? 3 : Math.min(3, devicePixelRatio || 1);
      this.canvas.width = Math.round(this.width * this.ratio);
      this.canvas.height = Math.round(this.height * this.ratio);
      this.canvas.style.width = `${this.width}px`;
      this.canvas.style.height = `${this.height}px`;
      const style = getComputedStyle(document.documentElement);
      this.colours = Object.fromEntries(['forward', 'backward', 'weight', 'overlapped', 'communication', 'optimizer', 'bubble', 'ink', 'muted', 'rule', 'paper', 'focus', 'on-forward', 'on-backward', 'on-weight', 'on-overlapped', 'on-communication', 'on-optimizer', 'on-bubble']
        .map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
      this.draw();
    }

    x(time) { return this.left + (time - this.from) / (this.to - this.from) * (this.width - this.left - 8); }
    time(x) { return this.from + (x - this.left) / (this.width - this.left - 8) * (this.to - this.from); }

    show(from, to) {
      const least = 20 * this.unit * 50;
      const span = Math.min(this.whole, Math.max(least, to - from));
      from = Math.min(Math.max(0, from), this.whole - span);
      this.from = from;
      this.to = from + span;
      this.window.textContent = `${seconds(span)} from ${this.moment(from, 1)}, of ${seconds(this.whole)}`;
      this.schedule();
    }
    zoom(factor, at = (this.from + this.to) / 2) { this.show(at - (at - this.from) * factor, at + (this.to - at) * factor); }
    pan(share) {
      const by = share * (this.to - this.from);
      this.show(this.from + by, this.to + by);
    }
    showCell() {
      const { cells, timeline } = this.rows[Math.min(this.rows.length - 1, this.rows.length >> 1)];
      const i = cells.start.length >> 1;
      const unit = timeline.unit_s;
      const margin = 0.04 * (cells.end[i] - cells.start[i]);
      this.show((cells.start[i] - margin) * unit, (cells.end[i] + margin) * unit);
    }
    schedule() {
      if (this.pending) return;
      this.pending = true;
      requestAnimationFrame(() => {
        this.pending = false;
        if (this.rows) this.draw();
      });
    }

    /// Cells while they are small, then phases, then ops.
    level() {
      const pixels = (this.width - this.left) / (this.to - this.from);
      if (this.meanCell === undefined) {
        const all = this.rows.flatMap((r) => [sum(Array.from(r.cells.end, (e, i) => e - r.cells.start[i])) / r.cells.end.length * r.timeline.unit_s]);
        this.meanCell = sum(all) / all.length;
        const lane = this.rows[0].lanes[0];
        this.meanOp = lane && lane.ops && lane.ops.end.length ? sum(Array.from(lane.ops.end, (e, i) => e - lane.ops.start[i])) / lane.ops.end.length * this.rows[0].timeline.unit_s : Infinity;
      }
      if (this.meanCell * pixels < 90) return 'cells';
      return this.meanOp * pixels >= 4 ? 'ops' : 'phases';
    }

    /// When something begins: to a microsecond, which is less than an op takes.
    moment(units, unit) {
      return `${(units * unit).toFixed(6)}\u202fs`;
    }

    describe(row, level, lane, i) {
      const t = row.timeline;
      const unit = t.unit_s;
      const who = `${this.both ? `${row.name}, ` : ''}position ${row.rank.position}`;
      if (level === 'cells') {
        const c = row.cells;
        const kind = t.cell_kinds[c.kind[i]];
        return `${who}: ${this.cellName(row, i)} (${kind.replace('_', ' ')}, stage ${c.stage[i]}${c.pair_stage[i] !== c.stage[i] ? ` and ${c.pair_stage[i]}` : ''}), ${seconds((c.end[i] - c.start[i]) * unit)} from ${this.moment(c.start[i], unit)}`;
      }
      const p = lane.phases;
      const phase = (k) => `${t.phases[p.phase[k]]}${p.layer[k] >= 0 ? `, layer ${p.layer[k]}` : ''}, micro-batch ${p.micro_batch[k]}`;
      if (level === 'phases') return `${who}, ${lane.stream.replace('_', ' ')}: ${phase(i)}, ${p.ops[i]} op${p.ops[i] === 1 ? '' : 's'}, ${seconds((p.end[i] - p.start[i]) * unit)} from ${this.moment(p.start[i], unit)}`;
      const shape = t.shapes[lane.ops.shape[i]];
      const inPhase = firstAfter(p.end, lane.ops.start[i]);
      return `${who}, ${lane.stream.replace('_', ' ')}: ${shape.label} (${shape.shape}) in ${phase(Math.min(inPhase, p.end.length - 1))}, ${seconds((lane.ops.end[i] - lane.ops.start[i]) * unit)} from ${this.moment(lane.ops.start[i], unit)}`;
    }
    cellName(row, i) {
      const c = row.cells;
      const kind = row.timeline.cell_kinds[c.kind[i]];
      return { forward: `F${c.micro_batch[i]}`, backward: `B${c.micro_batch[i]}`, backward_input: `B${c.micro_batch[i]}`, weight: `W${c.micro_batch[i]}`, overlapped: `F${c.micro_batch[i]}&B${c.pair_micro_batch[i]}`, optimizer: 'optimizer' }[kind];
    }

    /// Calls visit(rectangle, kind, text, what) for what is to be seen of a row.
    spans(row, r, visit) {
      const level = this.level();
      const unit = row.timeline.unit_s;
      const top = this.top + r * this.rowHeight + 2;
      const height = this.rowHeight - 4;
      const lane = (entries, y, h, kind, text, what) => {
        let skippedTo = -1;
        for (let i = firstAfter(entries.end, this.from / unit); i < entries.end.length && entries.start[i] * unit < this.to; ++i) {
          const left = this.x(entries.start[i] * unit);
          const right = this.x(entries.end[i] * unit);
          if (right < skippedTo + 0.5) continue; // less than half a pixel after what is drawn there
          skippedTo = right;
          if (visit({ x: Math.max(this.left, left), y, width: Math.max(0.6, Math.min(right, this.width) - Math.max(this.left, left)), height: h }, kind(i), text(i), { row, r, i, ...what }) === true) return;
        }
      };
      const strip = level === 'cells' ? height : 6;
      lane(row.cells, top, strip, (i) => CELL_KINDS[row.timeline.cell_kinds[row.cells.kind[i]]], (i) => (level === 'cells' ? this.cellName(row, i) : ''), { level: 'cells' });
      if (level === 'cells') return;
      for (const one of row.lanes) {
        const track = LANES[one.track];
        if (!track) continue;
        const y = top + strip + 1 + sum(LANES.slice(0, one.track).map((l) => l.height)) * (height - strip - 1);
        const h = track.height * (height - strip - 1) - 1;
        if (level === 'ops' && one.ops) {
          const p = one.phases;
          lane(one.ops, y, h, (i) => {
            const at = Math.min(firstAfter(p.end, one.ops.start[i]), p.end.length - 1);
            return kindOf(row.timeline.phases[p.phase[at]]);
          }, (i) => row.timeline.shapes[one.ops.shape[i]].label, { level: 'ops', lane: one });
        } else {
          lane(one.phases, y, h, (i) => kindOf(row.timeline.phases[one.phases.phase[i]]), (i) => row.timeline.phases[one.phases.phase[i]], { level: 'phases', lane: one });
        }
      }
    }

    draw() {
      const g = this.canvas.getContext('2d');
      const c = this.colours;
      g.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
      g.fillStyle = c.paper;
      g.fillRect(0, 0, this.width, this.height);
      g.textBaseline = 'middle';
      g.font = '11px system-ui, sans-serif';
      const scale = d3.scaleLinear().domain([this.from, this.to]).range([this.left, this.width - 8]);
      const ticks = scale.ticks(Math.max(3, Math.floor((this.width - this.left) / 110)));
      g.textAlign = 'center';
      const places = Math.max(0, Math.ceil(-Math.log10(ticks[1] - ticks[0]) - 1e-9));
      for (const tick of ticks) {
        g.fillStyle = c.rule;
        g.fillRect(scale(tick), this.top - 4, 1, this.height);
        g.fillStyle = c.muted;
        const text = this.to - this.from < 0.5 ? `${(tick * 1e3).toFixed(Math.max(0, places - 3))} ms` : `${tick.toFixed(places)} s`;
        g.fillText(text, Math.min(scale(tick), this.width - 24), this.top - 14);
      }
      this.rows.forEach((row, r) => {
        const y = this.top + r * this.rowHeight;
        g.fillStyle = c.rule;
        if (r > 0 && (!this.both || row.rank !== this.rows[r - 1].rank)) g.fillRect(0, y, this.width, 1);
        g.fillStyle = c.ink;
        g.textAlign = 'left';
        const rank = row.rank;
        g.font = r === this.row && document.activeElement === this.canvas ? 'bold 11px system-ui, sans-serif' : '11px system-ui, sans-serif';
        g.fillText(this.both ? `${rank.position}: ${row.name}` : positionName(rank), 2, y + this.rowHeight / 2);
        g.font = '11px system-ui, sans-serif';
        g.textAlign = 'center';
        this.spans(row, r, (box, kind, text) => {
          g.fillStyle = c[kind];
          const gap = box.width > 3 ? 0.6 : 0;
          g.fillRect(box.x, box.y, box.width - gap, box.height);
          if (text && box.width > 7 * text.length + 4 && box.height > 9) {
            g.fillStyle = c[`on-${kind}`];
            g.fillText(text, box.x + box.width / 2, box.y + box.height / 2 + 0.5);
          }
        });
      });
      if (this.selected) this.outline(g);
      this.canvas.dataset.level = this.level();
    }

    outline(g) {
      const { row, r, level, lane, i } = this.selected;
      const entries = level === 'cells' ? row.cells : level === 'ops' ? lane.ops : lane.phases;
      const unit = row.timeline.unit_s;
      const left = Math.max(this.left, this.x(entries.start[i] * unit));
      const right = Math.min(this.width, this.x(entries.end[i] * unit));
      if (right < left) return;
      g.strokeStyle = this.colours.focus;
      g.lineWidth = 2;
      g.strokeRect(left, this.top + r * this.rowHeight + 1, Math.max(2, right - left), this.rowHeight - 2);
    }

    select(what) {
      this.selected = what;
      this.status.textContent = what ? this.describe(what.row, what.level, what.lane, what.i) : '';
      this.schedule();
    }

    at(x, y) {
      const r = Math.floor((y - this.top) / this.rowHeight);
      if (!this.rows || r < 0 || r >= this.rows.length || x < this.left) return null;
      let found = null;
      this.spans(this.rows[r], r, (box, kind, text, what) => {
        if (x >= box.x - 0.5 && x <= box.x + box.width + 0.5 && y >= box.y && y <= box.y + box.height) found = what;
      });
      return found;
    }

    /// The next or the previous cell, phase or op of the row that is chosen.
    step_to(direction) {
      const row = this.rows[this.row];
      const level = this.level();
      const lane = row.lanes[0];
      const entries = level === 'cells' ? row.cells : level === 'ops' && lane.ops ? lane.ops : lane.phases;
      let i = this.selected && this.selected.row === row && this.selected.level === level ? this.selected.i + direction
        : firstAfter(entries.end, this.from / row.timeline.unit_s);
      i = Math.min(Math.max(0, i), entries.end.length - 1);
      const middle = (entries.start[i] + entries.end[i]) / 2 * row.timeline.unit_s;
      if (middle < this.from || middle > this.to) {
        const half = (this.to - this.from) / 2;
        this.show(middle - half, middle + half);
      }
      this.select({ row, r: this.row, level, lane, i });
    }

    key(event) {
      const act = {
        '+': () => this.zoom(0.5), '=': () => this.zoom(0.5), '-': () => this.zoom(2), ArrowLeft: () => this.pan(-0.2), ArrowRight: () => this.pan(0.2),
        Home: () => this.show(0, this.whole), 0: () => this.show(0, this.whole),
        ArrowUp: () => { this.row = Math.max(0, this.row - 1); this.select(null); this.step_to(0); },
        ArrowDown: () => { this.row = Math.min(this.rows.length - 1, this.row + 1); this.select(null); this.step_to(0); },
        n: () => this.step_to(1), p: () => this.step_to(-1),
        Enter: () => {
          if (!this.selected) return;
          const { row, level, lane, i } = this.selected;
          const entries = level === 'cells' ? row.cells : level === 'ops' ? lane.ops : lane.phases;
          const unit = row.timeline.unit_s;
          const margin = 0.1 * (entries.end[i] - entries.start[i]) * unit;
          this.show(entries.start[i] * unit - margin, entries.end[i] * unit + margin);
        },
        Escape: () => this.select(null),
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey || !this.rows) return;
      event.preventDefault();
      act();
    }

    listen() {
      const place = (event) => {
        const box = this.canvas.getBoundingClientRect();
        return [event.clientX - box.left, event.clientY - box.top];
      };
      this.canvas.addEventListener('keydown', (event) => this.key(event));
      for (const name of ['focus', 'blur']) this.canvas.addEventListener(name, () => this.schedule());
      this.canvas.addEventListener('wheel', (event) => {
        if (!event.ctrlKey && !event.metaKey) return; // else the page scrolls
        event.preventDefault();
        this.zoom(Math.exp(event.deltaY * 0.004), this.time(place(event)[0]));
      }, { passive: false });
      this.canvas.addEventListener('dblclick', (event) => this.zoom(event.shiftKey ? 4 : 0.25, this.time(place(event)[0])));
      let drag = null;
      this.canvas.addEventListener('pointerdown', (event) => {
        drag = { x: place(event)[0], from: this.from, moved: false };
        this.canvas.setPointerCapture(event.pointerId);
      });
      this.canvas.addEventListener('pointermove', (event) => {
        const [x, y] = place(event);
        if (drag) {
          const by = (drag.x - x) / (this.width - this.left - 8) * (this.to - this.from);
          drag.moved = drag.moved || Math.abs(drag.x - x) > 3;
          if (drag.moved) this.show(drag.from + by, drag.from + by + (this.to - this.from));
          return;
        }
        const found = this.at(x, y);
        this.canvas.style.cursor = found ? 'pointer' : 'grab';
        const text = found ? this.describe(found.row, found.level, found.lane, found.i) : '';
        this.canvas.title = text;
      });
      this.canvas.addEventListener('pointerup', (event) => {
        const [x, y] = place(event);
        if (drag && !drag.moved) {
          const found = this.at(x, y);
          if (found) this.row = found.r;
          this.select(found);
        }
        drag = null;
      });
    }
  }

  function timeline(scenario) {
    if (!scenario.timeline) return null;
    const view = new Timeline(scenario);
    const ops = sum(scenario.timeline.rows.flatMap((row) => row.lanes.map((lane) => lane.ops)));
    const made = section('timeline', 'The step as a timeline',
      `${ops.toLocaleString('en')} operations of one rank a pipeline position, each with its time: cells from afar, phases nearer, single operations close up. `
        + (scenario.measured ? 'Under each simulated row the measured one, on the same axis.' : ''),
      legend(PHASES.filter((p) => p.kind === 'communication' || (p.kind !== 'bubble' && scenario.report.phases_s[p.key] > 0)).map((p) => (p.key === 'exposed_communication' ? { ...p, name: 'communication' } : p))),
      view.node,
      element('p', { id: 'timeline-help', class: 'help' }, 'Drag to move, Ctrl and wheel or double click to zoom, click for a name. Keys: + and \u2212 zoom, arrows move and choose a row, n and p go to the next and the previous span, Enter zooms to it, Home shows the whole step.'));
    view.load();
    return made;
  }

  // ---- what can be taken away

  function csv(columns, rows) {
    const field = (value) => {
      let text = value === null || value === undefined ? '' : String(value);
      if (typeof value === 'string' && /^[=+\-@\t\r]/.test(text)) text = `'${text}`; // no formula of a spreadsheet
      return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
    };
    return [columns, ...rows].map((row) => row.map(field).join(',')).join('\r\n') + '\r\n';
  }

  function downloads(scenario) {
    const r = scenario.report;
    const save = (name, kind, make) => {
      const button = element('button', { type: 'button', onclick: () => {
        const url = URL.createObjectURL(new Blob([make()], { type: kind }));
        const link = element('a', { href: url, download: name });
        document.body.append(link);
        link.click();
        link.remove();
        setTimeout(() => URL.revokeObjectURL(url), 10000);
      } }, name);
      return element('li', {}, button);
    };
    const ofRows = (list) => {
      const columns = Object.keys(list[0] || {}).filter((key) => typeof list[0][key] !== 'object');
      return csv(columns, list.map((row) => columns.map((key) => row[key])));
    };
    const list = [
      save('report.json', 'application/json', () => JSON.stringify(r, null, 2)),
      save('prices.csv', 'text/csv', () => ofRows(r.prices)),
      save('phases.csv', 'text/csv', () => csv(['rank', 'position', 'stages', ...PHASES.map((p) => p.key)], r.ranks.map((rank) => [rank.rank, rank.position, rank.stages.join(' '), ...PHASES.map((p) => rank.phases_s[p.key])]))),
      save('memory.csv', 'text/csv', () => csv(['rank', 'position', 'peak', ...MEMORY.map((k) => k.key)], r.memory_peak_bytes.per_stage.map((m) => [m.rank, m.position, m.peak, ...MEMORY.map((k) => m.at_peak[k.key])]))),
    ];
    if (scenario.assumptions) list.push(save('assumptions.csv', 'text/csv', () => ofRows(scenario.assumptions)));
    if (scenario.scaling) list.push(save('scaling.csv', 'text/csv', () => ofRows([...scenario.scaling.same_batch.points, ...scenario.scaling.growing_batch.points])));
    if (scenario.sensitivity) list.push(save('sensitivity.csv', 'text/csv', () => ofRows(scenario.sensitivity.rows)));
    list.push(save('page.json', 'application/json', () => JSON.stringify(data)));
    return section('data', 'Raw data', 'Everything here is in this file; page.json is all of it.', element('ul', { class: 'downloads' }, ...list));
  }

  // ---- the page

  function show(scenario) {
    const r = scenario.report;
    const head = document.getElementById('head');
    head.replaceChildren(
      element('p', { class: 'kind' }, 'Capacity report'),
      element('h1', {}, r.scenario),
      element('p', { class: 'plan' }, `${count(r.gpus)} \u00d7 ${r.device}, ${r.plan}`),
      r.executed_on ? element('p', { class: 'plan' }, `executed on ${r.executed_on}`) : '');
    if (data.scenarios.length > 1) {
      const choice = element('select', { id: 'scenario' }, ...data.scenarios.map((s, i) => element('option', { value: i, selected: s === scenario }, s.report.scenario)));
      choice.addEventListener('change', () => {
        show(data.scenarios[Number(choice.value)]);
        document.getElementById('scenario').focus();
      });
      head.append(element('p', { class: 'choice' }, element('label', { for: 'scenario' }, 'Scenario '), choice));
    }
    const sections = [answer(scenario), compared(), phases(scenario), timeline(scenario), measured(scenario), memory(scenario), network(scenario),
      scaling(scenario), tornado(scenario), search(), budget(), reliability(), validation(), costliest(scenario), assumptions(scenario), downloads(scenario)]
      .filter((node) => node !== null);
    document.getElementById('main').replaceChildren(...sections);
    document.getElementById('contents').replaceChildren(element('ul', {}, ...sections.map((node) => element('li', {},
      element('a', { href: `#${node.id}` }, SHORT[node.id])))));
    const foot = document.getElementById('foot');
    foot.querySelector('.made')?.remove();
    foot.prepend(element('p', { class: 'made' }, `Made by Orrery from ${scenario.file}. Fingerprint of the timeline ${r.fingerprint}; ${count(r.engine.operations)} operations, ${count(r.engine.ranks_simulated)} ranks simulated. The same input makes the same page.`));
  }

  show(data.scenarios[0]);
})();

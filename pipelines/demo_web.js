// The page of `sami-cache demo-web`. Everything it asks for, it asks the server it came from.
'use strict';

const BLUE = [38, 132, 255];
const DRAG = 5; // CSS pixels that a pointer moves before a click is a box
const $ = (id) => document.getElementById(id);

let about = {};
let picture = null; // {file, id, width, height, ready}
let prompts = []; // in the order they were given: {x, y, label} or {box: [x0, y0, x1, y1]}; of several boxes the last counts
let answer = null; // of /api/predict: {width, height, iou, masks, prompted}; of /api/everything: {width, height, labels, masks: how many}
let choice = 0;
let drag = null; // what the pointer draws: {x, y, clientX, clientY, label, box}
let cursor = null; // of the keyboard: {x, y, corner}
let opening = 0; // counts pictures: answers about an earlier one are dropped
let asked = 0; // counts changes of the prompts, for the same end
let predicting = false;
let changed = 0; // when the prompts last changed, for the time a mask takes

// ---- the server

async function post(path, body) {
  const type = body instanceof Blob ? 'application/octet-stream' : 'application/json';
  let reply;
  try {
    reply = await fetch(path, {
      method: 'POST', headers: { 'Content-Type': type }, body: body instanceof Blob ? body : JSON.stringify(body),
    });
  } catch {
    throw new Error('The server does not answer. Is sami-cache demo-web still running?');
  }
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => ({}));
  throw Object.assign(new Error(said.error || `The server answered ${reply.status}.`), { status: reply.status });
}

/** Ask about the picture; the server holds only a few, and one that it let go is sent again. */
async function ask(path, more = {}) {
  const target = picture;
  try {
    return await post(path, { id: target.id, ...more });
  } catch (error) {
    if (error.status !== 410) throw error;
    await send(target);
    await post('/api/encode', { id: target.id });
    if (path === '/api/labels') await post('/api/everything', { id: target.id }); // that was let go with it
    return post(path, { id: target.id, ...more });
  }
}

/** Adds what the server says of the picture: id, width, height. */
async function send(target) {
  Object.assign(target, await (await post('/api/picture', target.file)).json());
}

// ---- opening a picture

async function open(file) {
  if (!file) return;
  if (file.size > about.max_bytes) {
    return problem(`${file.name || 'The picture'} is too large: ${megabytes(file.size)}, at most ${megabytes(about.max_bytes)}.`);
  }
  const turn = ++opening;
  const stop = busy('Reading the picture');
  let next;
  try {
    next = { file, name: (file.name || 'picture').replace(/\.[^.]*$/, ''), ready: false };
    await send(next);
  } catch (error) {
    if (turn === opening) problem(error.message);
    return;
  } finally {
    stop();
  }
  if (turn !== opening) return;
  problem('');
  picture = next;
  prompts = [];
  answer = cursor = drag = null;
  asked++;
  $('empty').hidden = true;
  $('stage').hidden = $('tools').hidden = false;
  $('stage').style.setProperty('--ratio', picture.width / picture.height);
  $('photo').src = `/api/picture/${picture.id}.jpg`;
  $('photo').alt = file.name || 'The picture';
  draw();
  const done = busy('Encoding');
  try {
    const { seconds } = await (await post('/api/encode', { id: picture.id })).json();
    if (turn !== opening) return;
    picture.ready = true;
    say(`Encoded in ${seconds.toFixed(1)} s. Click an object, or drag a box around it.`);
  } catch (error) {
    if (turn === opening) problem(error.message);
  } finally {
    done();
  }
  if (turn === opening) {
    draw();
    if (picture.ready && prompts.length) predict();
  }
}

// ---- masks

function add(prompt) {
  if (!picture) return;
  prompts.push(prompt);
  promptsChanged();
}

function undo() {
  if (answer?.labels) answer = null;
  else prompts.pop();
  promptsChanged();
}

function clear() {
  prompts = [];
  promptsChanged();
}

function promptsChanged() {
  asked++;
  changed = performance.now();
  problem('');
  if (!prompts.length || answer?.labels) answer = null;
  if (!prompts.length) say(picture.ready ? 'Click an object, or drag a box around it.' : '');
  draw();
  if (prompts.length && picture.ready) predict();
  else if (prompts.length) say('The mask comes as soon as the picture is encoded.');
}

/** The prompts as the server takes them, in pixels of the picture. */
function question() {
  const points = prompts.filter((prompt) => !prompt.box);
  return {
    points: points.map(({ x, y }) => [x, y]),
    labels: points.map(({ label }) => label),
    box: prompts.findLast((prompt) => prompt.box)?.box ?? null,
  };
}

/** One question at a time: what changes meanwhile is asked when the answer is there. */
async function predict() {
  if (predicting) return;
  predicting = true;
  let turn;
  do {
    turn = asked;
    const started = changed;
    try {
      const prompted = question();
      const found = await (await ask('/api/predict', prompted)).json();
      if (turn !== asked) continue;
      answer = { ...found, prompted };
      choice = found.iou.indexOf(Math.max(...found.iou));
      draw();
      document.body.dataset.milliseconds = Math.round(performance.now() - started);
      tell();
    } catch (error) {
      if (turn !== asked) continue;
      if (error.status === 400) { // what cannot be answered is not kept; the server may have had other reasons
        prompts.pop();
        turn = ++asked;
      }
      problem(error.message);
      draw();
    }
  } while (turn !== asked && prompts.length && picture.ready); // a new picture asks for itself once it is encoded
  predicting = false;
}

async function everything() {
  if (!picture?.ready) return;
  prompts = [];
  answer = null;
  const turn = ++asked;
  problem('');
  draw();
  const stop = busy('Finding everything');
  try {
    const found = await (await ask('/api/everything')).json();
    if (turn !== asked) return;
    answer = { ...found, labels: fill(found.runs, found.width * found.height) };
    say(`${found.masks} masks in ${found.seconds.toFixed(1)} s. A click starts anew.`);
  } catch (error) {
    if (turn === asked) problem(error.message);
  } finally {
    stop();
  }
  draw();
}

/** [value, length, value, length, ...] to one value a pixel, row by row. */
function fill(runs, size) {
  const values = new Uint16Array(size);
  for (let index = 0, at = 0; index < runs.length; index += 2) {
    if (runs[index]) values.fill(runs[index], at, at + runs[index + 1]);
    at += runs[index + 1];
  }
  return values;
}

/** Bits in base64, eight pixels a byte, the first the highest: to one value a pixel, row by row. */
function unpack(bits, size) {
  const bytes = atob(bits);
  const values = new Uint8Array(size);
  for (let at = 0; at < size; at++) values[at] = (bytes.charCodeAt(at >> 3) >> (7 - (at & 7))) & 1;
  return values;
}

async function download(path, ending, more) {
  const stop = busy('Preparing the file');
  try {
    const blob = await (await ask(path, more)).blob();
    const link = document.createElement('a');
    link.href = URL.createObjectURL(blob);
    link.download = `${picture.name}-${ending}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } catch (error) {
    problem(error.message);
  } finally {
    stop();
  }
}

function downloadMask() {
  if (answer?.labels) download('/api/labels', 'masks');
  else if (answer) download('/api/mask', 'mask', { ...answer.prompted, choice });
}

// ---- what is seen

function draw() {
  drawMask();
  drawMarks();
  const one = answer !== null && !answer.labels;
  $('undo').disabled = $('clear').disabled = !prompts.length && !answer;
  $('everything').disabled = !picture?.ready;
  $('download').disabled = !answer;
  $('cutout').disabled = $('choices').disabled = !one;
  document.querySelectorAll('#choices label').forEach((label, index) => {
    label.querySelector('input').checked = one && index === choice;
    label.querySelector('b').textContent = one ? answer.iou[index].toFixed(2) : '–';
  });
}

function drawMask() {
  const canvas = $('mask');
  if (!answer) {
    canvas.width = canvas.height = 1; // setting a size clears it
    return;
  }
  const { width, height } = answer;
  const values = answer.labels ?? unpack(answer.masks[choice], width * height);
  const pixels = new ImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer);
  const solid = answer.labels ? hues(answer.masks, 255) : [0, word(BLUE, 255)];
  // Never quite nothing: a mask at opacity 0 keeps its outline, and its pixels can still be told from others.
  const alpha = Math.max(1, Math.round(2.55 * $('opacity').value));
  const soft = answer.labels ? hues(answer.masks, alpha) : [0, word(BLUE, alpha)];
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      const value = values[at];
      if (!value) continue;
      const edge = (x > 0 && values[at - 1] !== value) || (x < width - 1 && values[at + 1] !== value)
        || (y > 0 && values[at - width] !== value) || (y < height - 1 && values[at + width] !== value);
      words[at] = (edge ? solid : soft)[value];
    }
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext('2d').putImageData(pixels, 0, 0);
}

const word = ([red, green, blue], alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** A colour for each of `count` masks, 1 to count: neighbours in number far apart in hue. */
function hues(count, alpha) {
  const colours = [0];
  for (let index = 1; index <= count; index++) {
    const hue = (index * 137.508) % 360;
    const channel = (shift) => {
      const k = (shift + hue / 30) % 12;
      return Math.round(255 * (0.55 - 0.4 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    };
    colours.push(word([channel(0), channel(8), channel(4)], alpha));
  }
  return colours;
}

function drawMarks() {
  const svg = $('marks');
  svg.replaceChildren();
  if (!picture) return;
  const { clientWidth: width, clientHeight: height } = $('stage');
  svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  const at = (x, y) => [((x + 0.5) / picture.width) * width, ((y + 0.5) / picture.height) * height];
  const mark = (name, attributes) => {
    const shape = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    svg.append(shape);
  };
  const box = drag?.box ?? question().box;
  if (box) {
    const [x0, y0] = at(box[0], box[1]);
    const [x1, y1] = at(box[2], box[3]);
    mark('rect', { class: 'box', x: x0, y: y0, width: x1 - x0, height: y1 - y0, rx: 2 });
  }
  for (const prompt of prompts.filter((each) => !each.box)) {
    const [x, y] = at(prompt.x, prompt.y);
    mark('circle', { class: prompt.label ? 'in' : 'out', cx: x, cy: y, r: 8 });
    mark('path', { d: `M${x - 4} ${y}h8${prompt.label ? `M${x} ${y - 4}v8` : ''}` });
  }
  if (cursor) {
    const [x, y] = at(cursor.x, cursor.y);
    mark('path', { class: 'cross', d: `M${x - 14} ${y}h28M${x} ${y - 14}v28` });
  }
}

const say = (text) => { $('state').textContent = text; };

function tell() {
  const which = answer.masks.length > 1 ? `Mask ${choice + 1} of ${answer.masks.length}, ` : '';
  say(`${which}IoU estimate ${answer.iou[choice].toFixed(2)}, in ${document.body.dataset.milliseconds} ms`);
}

function problem(text) {
  $('problem').textContent = text;
  $('problem').hidden = !text;
}

/** Show what is being done and for how long, until the function returned here is called. */
function busy(what) {
  const started = performance.now();
  const show = () => { $('busy').textContent = `${what}… ${((performance.now() - started) / 1000).toFixed(1)} s`; };
  const timer = setInterval(show, 100);
  show();
  say(`${what}…`); // once: a screen reader need not hear every tenth of a second
  $('busy').hidden = false;
  busy.latest = timer;
  return () => {
    clearInterval(timer);
    if (busy.latest === timer) $('busy').hidden = true;
    if ($('state').textContent === `${what}…`) say('');
  };
}

const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(0)} MiB`;

// ---- mouse, touch, keys

/** The pixel of the picture under the pointer. */
function place({ clientX, clientY }) {
  const area = $('stage').getBoundingClientRect();
  const pixel = (share, size) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
  return {
    x: pixel((clientX - area.left) / area.width, picture.width),
    y: pixel((clientY - area.top) / area.height, picture.height),
  };
}

const between = (one, other) => [
  Math.min(one.x, other.x), Math.min(one.y, other.y), Math.max(one.x, other.x), Math.max(one.y, other.y),
];
const isBox = ([x0, y0, x1, y1]) => x1 > x0 && y1 > y0;
const chosenLabel = () => Number(document.querySelector('input[name=label]:checked').value);

$('stage').addEventListener('pointerdown', (event) => {
  if (event.button !== 0 && event.button !== 2) return;
  const negative = event.button === 2 || event.shiftKey;
  drag = { ...place(event), clientX: event.clientX, clientY: event.clientY, label: negative ? 0 : chosenLabel(), box: null };
  $('stage').setPointerCapture(event.pointerId);
});
$('stage').addEventListener('pointermove', (event) => {
  if (!drag) return;
  const far = Math.hypot(event.clientX - drag.clientX, event.clientY - drag.clientY) >= DRAG;
  if (far || drag.box) drag.box = between(drag, place(event));
  drawMarks();
});
$('stage').addEventListener('pointerup', () => {
  if (!drag) return;
  const { x, y, label, box } = drag;
  drag = null;
  cursor = null;
  if (!box) add({ x, y, label });
  else if (isBox(box)) add({ box });
  else drawMarks();
});
$('stage').addEventListener('pointercancel', () => { drag = null; drawMarks(); });
$('stage').addEventListener('contextmenu', (event) => event.preventDefault());

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

$('stage').addEventListener('keydown', (event) => {
  if (!picture) return;
  const step = ARROWS[event.key];
  if (!step && event.key !== 'Enter' && event.key.toLowerCase() !== 'b') return;
  event.preventDefault();
  cursor ??= { x: Math.floor(picture.width / 2), y: Math.floor(picture.height / 2), corner: null };
  if (step) {
    const size = event.ctrlKey ? 1 : Math.max(1, Math.round(Math.max(picture.width, picture.height) / 50));
    cursor.x = Math.min(picture.width - 1, Math.max(0, cursor.x + step[0] * size));
    cursor.y = Math.min(picture.height - 1, Math.max(0, cursor.y + step[1] * size));
    drag = cursor.corner && { ...cursor.corner, box: between(cursor.corner, cursor) };
    drawMarks();
  } else if (event.key === 'Enter') {
    add({ x: cursor.x, y: cursor.y, label: event.shiftKey ? 0 : chosenLabel() });
  } else if (!cursor.corner) {
    cursor.corner = { x: cursor.x, y: cursor.y };
    say('One corner of a box. Move to the other and press B again.');
  } else {
    const box = between(cursor.corner, cursor);
    cursor.corner = drag = null;
    if (isBox(box)) add({ box });
    else drawMarks();
  }
});

document.addEventListener('keydown', (event) => {
  if (event.altKey || event.metaKey || (event.ctrlKey && event.key !== 'z')) return;
  if (event.target.matches?.('input[type=range], input[type=file]')) return;
  const key = event.key.toLowerCase();
  if (key === 'o') $('file').click();
  else if (!picture) return;
  else if (key === 'z') $('undo').click();
  else if (key === 'c') $('clear').click();
  else if (key === 'e') $('everything').click();
  else if (key === 'd') $('download').click();
  else if ('123'.includes(key) && answer?.iou && !event.ctrlKey) choose(Number(key) - 1);
  else return;
  event.preventDefault();
});

function choose(index) {
  if (!(index < answer.masks.length)) return;
  choice = index;
  draw();
  tell();
}

$('choices').addEventListener('change', (event) => choose(Number(event.target.value)));
$('opacity').addEventListener('input', drawMask);
$('undo').addEventListener('click', undo);
$('clear').addEventListener('click', () => { answer = null; clear(); });
$('everything').addEventListener('click', everything);
$('download').addEventListener('click', downloadMask);
$('cutout').addEventListener('click', () => download('/api/cutout', 'cutout', { ...answer.prompted, choice }));
$('open').addEventListener('click', () => $('file').click());
$('empty').addEventListener('click', () => $('file').click());
$('file').addEventListener('change', () => { open($('file').files[0]); $('file').value = ''; });
new ResizeObserver(drawMarks).observe($('stage'));

document.addEventListener('paste', (event) => open([...event.clipboardData.files][0]));
document.addEventListener('dragover', (event) => { event.preventDefault(); document.body.classList.add('dragging'); });
document.addEventListener('dragleave', (event) => {
  if (!event.relatedTarget) document.body.classList.remove('dragging');
});
document.addEventListener('drop', (event) => {
  event.preventDefault();
  document.body.classList.remove('dragging');
  const [file] = event.dataTransfer.files;
  if (file) open(file);
  else problem('That was no file. Save the picture first, or copy and paste it.');
});

fetch('/api/about').then((reply) => reply.json()).then((found) => {
  about = found;
  $('model').textContent = found.model;
  $('limits').textContent = `${found.formats}, up to ${found.max_pixels / 1e6} megapixels and ${megabytes(found.max_bytes)}`;
});

// Calls the page's functions: `node unlearn_page.js INPUT.json OUTPUT.json`, see test_unlearn_page.py.
"use strict";
const fs = require("fs"), page = "../docs/unlearn/";
const [DATA, model, unlearn, section4, {ksTest}] = ["data", "model", "unlearn", "section4", "kstest"].map(
  name => require(`${page}${name}.js`));

const input = JSON.parse(fs.readFileSync(process.argv[2], "utf8")), start = model.loadWeights(DATA);
const plain = record => Object.fromEntries(Object.entries(record).map(([name, x]) => [name, Array.from(x)]));
const output = {
  logits: input.texts.map(({ids, places}) => Array.from(model.forward(start, ids, places))),
  answers: input.prompts.map(ids => model.generate(start, ids, input.newTokens)),
  gradients: input.objectives.map(objective => {
    const {loss, parts, gradients} = model.lossAndGradients(start, input.batch, objective);
    return {loss, parts, gradients: plain(gradients)};
  }),
};
const trained = model.copyWeights(start), state = {}, begin = Date.now();
output.steps = input.steps.map(({forget, retain, lr}) => {
  const batch = {forget, retain, referenceLogps: model.answerLogps(start, forget)};
  return unlearn.unlearnStep(trained, batch, input.objectives[2], state, {lr, weightDecay: 0.01}).loss;
});
output.secondsPerStep = (Date.now() - begin) / 1000 / input.steps.length;
output.trained = plain(trained);
const instance = section4.makeInstance(input.instance);
output.paths = input.methods.map(method => section4.pathOf(instance, method));
output.tests = input.samples.map(([x, y]) => ksTest(x, y));
output.runs = DATA.runs.map(run => run.logR.map(values => ksTest(values, DATA.judge.logR)));
fs.writeFileSync(process.argv[3], JSON.stringify(output));

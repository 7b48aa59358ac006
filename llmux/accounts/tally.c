// What is done for each request by the accounts, where that could be compiled: shares.py and accounting.py do the
// same in Python, and are the rule. See there for what it means; a test compares the two, to the last bit of a sum.
//
// Here is only what happens with nearly every request: a share without a switch, and the row of an answer that
// tells its tokens in the usual form. All else is given to `otherwise`, which is Python's, before anything has been
// changed. Only what CPython's stable ABI has is used, so that one file fits every version. Calls keep the GIL.
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <structmember.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    double now, clock, held, house, switch_seconds;  // see `Tally` in shares.py
    char holds, switching, plain;
    PyObject *running;
    double rest, epoch;
    Py_ssize_t made, room;
    PyObject *left, *prices, *ledger, *waiting, *otherwise;
} Tally;

enum { REQUEST, REQUEST_ID, ASKED, MODEL, TICKET, ID, ARRIVED, WAITED, AWAKE, NAMES };
static const char *const TEXTS[NAMES] = {"request", "request_id", "asked",  "model", "ticket",
                                         "id",      "arrived",    "waited", "awake"};
static PyObject *names[NAMES], *empty, *zero;

enum { ARGUMENTS = 8, FIELDS = 25, DIGITS = 12, TIMINGS = 12 };
static const double MOST = 9e15;  // what a double has to the last unit

static void pass_to(Tally *t, double now) {
    double past = now - t->now;
    if (!(past > 0)) return;
    t->now = now;
    if (!t->holds) return;
    t->held += past;
    Py_ssize_t parts = PyDict_Size(t->running) + (t->switching != 0);
    if (!parts) {
        t->house += past;
        return;
    }
    double part = past / (double)parts;
    t->clock += part;
    if (t->switching) t->switch_seconds += part;
}

static PyObject *tally_pass_to(PyObject *self, PyObject *now) {
    double time = PyFloat_AsDouble(now);
    if (time == -1.0 && PyErr_Occurred()) return NULL;
    pass_to((Tally *)self, time);
    Py_RETURN_NONE;
}

static PyObject *tally_admitted(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Tally *t = (Tally *)self;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "admitted() takes a time and an effect");
    double time = PyFloat_AsDouble(args[0]);
    if (time == -1.0 && PyErr_Occurred()) return NULL;
    pass_to(t, time);
    PyObject *request = PyObject_GetAttr(args[1], names[REQUEST]);
    if (!request) return NULL;
    int there = PyDict_Contains(t->running, request), failed = there < 0;
    if (!there) {
        PyObject *since = PyFloat_FromDouble(t->clock);
        failed = !since || PyDict_SetItem(t->running, request, since);
        Py_XDECREF(since);
    }
    Py_DECREF(request);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

// Take a request off those that run: its own part, 0 where it did not run, -1 with an exception.
static double over(Tally *t, double now, PyObject *request) {
    pass_to(t, now);
    PyObject *since = PyDict_GetItemWithError(t->running, request);
    if (!since) return PyErr_Occurred() ? -1.0 : 0.0;
    double own = t->clock - PyFloat_AsDouble(since);
    return PyDict_DelItem(t->running, request) ? -1.0 : own;
}

static PyObject *tally_over(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "over() takes a time and a request");
    double time = PyFloat_AsDouble(args[0]);
    if (time == -1.0 && PyErr_Occurred()) return NULL;
    double own = over((Tally *)self, time, args[1]);
    return own == -1.0 && PyErr_Occurred() ? NULL : PyFloat_FromDouble(own);
}

// `int(seconds * scale)`, where that is in the usual range; else 0 with `fits` unset.
static long long whole(double value, int *fits) {
    if (!(fabs(value) < MOST)) {
        *fits = 0;
        return 0;
    }
    return (long long)value;
}

static PyObject *or_empty(PyObject *text) { return text == Py_None ? empty : text; }

static PyObject *pass_on(Tally *t, PyObject *const *args) {
    return PyObject_CallFunctionObjArgs(t->otherwise, args[0], args[1], args[2], args[3], args[4], args[5], args[6],
                                        args[7], NULL);
}

// `Accounting.ended`: request, number, now, waited, status, failure, key, report.
static PyObject *tally_ended(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Tally *t = (Tally *)self;
    if (count != ARGUMENTS) return PyErr_Format(PyExc_TypeError, "ended() takes %d arguments", ARGUMENTS);
    PyObject *request = args[0], *report = args[7], *got[NAMES] = {NULL}, *row = NULL, *share = NULL;
    if (!t->plain || t->ledger == Py_None || t->left != Py_None || t->waiting == Py_None || !PyTuple_Check(report) ||
        PyList_Size(t->waiting) >= t->room)
        return pass_on(t, args);
    int usual = 1, fits = 1;
    got[AWAKE] = PyObject_GetAttr(t->ledger, names[AWAKE]);
    if (!got[AWAKE]) goto end;
    usual = got[AWAKE] == Py_True;
    for (int at = REQUEST_ID; usual && at <= TICKET; at++)
        if (!(got[at] = PyObject_GetAttr(request, names[at]))) goto end;
    usual = usual && got[TICKET] != Py_None;
    for (int at = ID; usual && at <= WAITED; at++)
        if (!(got[at] = PyObject_GetAttr(got[TICKET], names[at]))) goto end;
    if (!usual) {
        share = pass_on(t, args);
        goto end;
    }
    double now = PyFloat_AsDouble(args[2]), waited = PyFloat_AsDouble(args[3]);
    double arrived = PyFloat_AsDouble(got[ARRIVED]), queued = PyFloat_AsDouble(got[WAITED]);
    if (PyErr_Occurred()) goto end;
    long long time = whole((t->epoch + now) * 1000, &fits), queue = whole(waited * 1000, &fits);
    long long service = whole((now - arrived - queued) * 1000, &fits);
    whole(t->held * 1e6, &fits);  // of which any share is a part
    if (!fits) {
        share = pass_on(t, args);
        goto end;
    }
    double own = over(t, now, got[ID]);
    if (own == -1.0 && PyErr_Occurred()) goto end;
    double exact = own * 1e6 + t->rest;
    long long micros = (long long)exact;
    PyObject *read = PyTuple_GetItem(report, 0), *wrote = PyTuple_GetItem(report, 1);
    PyObject *model = or_empty(got[MODEL]);
    if (!read || !wrote) goto end;
    PyObject *numbers[] = {PyLong_FromLongLong(time), PyLong_FromLongLong(queue), PyLong_FromLongLong(service),
                           PyLong_FromLongLong(micros)};
    PyObject *const fields[FIELDS] = {
        numbers[0], got[REQUEST_ID], or_empty(args[6]), or_empty(got[ASKED]), model, model, read, zero, wrote, zero,
        zero, zero, empty, Py_None, numbers[1], numbers[2], numbers[3], zero, Py_None, Py_None, args[4],
        or_empty(args[5]), zero, args[1], t->prices,
    };
    if (numbers[0] && numbers[1] && numbers[2] && numbers[3] && (row = PyTuple_New(FIELDS))) {
        for (Py_ssize_t at = 0; at < FIELDS; at++) {
            Py_INCREF(fields[at]);
            PyTuple_SetItem(row, at, fields[at]);
        }
        if (!PyList_Append(t->waiting, row)) {
            t->rest = exact - (double)micros;
            t->made++;
            share = PyFloat_FromDouble(own);
        }
        Py_DECREF(row);
    }
    for (size_t at = 0; at < sizeof numbers / sizeof *numbers; at++) Py_XDECREF(numbers[at]);
end:
    for (int at = 0; at < NAMES; at++) Py_XDECREF(got[at]);
    return share;
}

static const char *after(const char *at, const char *end, const char *text) {
    size_t length = strlen(text);
    return at && (size_t)(end - at) >= length && !memcmp(at, text, length) ? at + length : NULL;
}

static const char *blank(const char *at, const char *end) { return at && at < end && *at == ' ' ? at + 1 : at; }

static const char *number(const char *at, const char *end, int most, long long *found) {
    const char *first = at;
    long long value = 0;
    for (; at && at < end && *at >= '0' && *at <= '9' && (!most || at - first < most); at++)
        if (most) value = value * 10 + (*at - '0');
    *found = value;
    return at == first ? NULL : at;
}

// `"name": ` and a number.
static const char *figure(const char *at, const char *end, const char *name, int most, long long *found) {
    return number(blank(after(at, end, name), end), end, most, found);
}

static const char *comma(const char *at, const char *end) { return blank(after(at, end, ","), end); }

// What comes after a report in the usual form; NULL: it is none.
static const char *usual(const char *at, const char *end, long long *read, long long *wrote) {
    long long total;
    at = after(blank(after(at, end, "\"usage\":"), end), end, "{");
    at = comma(figure(at, end, "\"prompt_tokens\":", DIGITS, read), end);
    if (!at) return NULL;
    const char *rest = figure(at, end, "\"completion_tokens\":", DIGITS, wrote);
    if (rest) {
        at = figure(comma(rest, end), end, "\"total_tokens\":", 0, &total);
        at = at ? at : rest;
    } else {
        at = comma(figure(at, end, "\"total_tokens\":", 0, &total), end);
        at = figure(at, end, "\"completion_tokens\":", DIGITS, wrote);
    }
    if (!at) return NULL;
    rest = after(at, end, "}");
    if (rest) return rest;
    return after(blank(after(comma(at, end), end, "\"prompt_tokens_details\":"), end), end, "null}");
}

static PyObject *report_of(const char *text, size_t length) {
    static const char name[] = "\"usage\"", timings[] = "\"timings\"";
    const char *end = text + length, *at = end;
    size_t size = sizeof name - 1;
    do {  // the last quote after which the name goes on
        at = length >= size ? memrchr(text, '"', (size_t)(at - text)) : NULL;
    } while (at && ((size_t)(end - at) < size || memcmp(at, name, size)));
    if (!at) Py_RETURN_NONE;
    long long read, wrote;
    const char *rest = usual(at, end, &read, &wrote);
    if (!rest || (end - rest > TIMINGS && memmem(at, (size_t)(end - at), timings, sizeof timings - 1))) Py_RETURN_NONE;
    PyObject *first = PyLong_FromLongLong(read), *second = PyLong_FromLongLong(wrote);
    PyObject *found = first && second ? PyTuple_Pack(2, first, second) : NULL;
    Py_XDECREF(first);
    Py_XDECREF(second);
    return found;
}

// `tokens.told`.
static PyObject *told(PyObject *module, PyObject *tail) {
    (void)module;
    if (!PyList_Check(tail)) return PyErr_Format(PyExc_TypeError, "told() takes a list");
    Py_ssize_t count = PyList_Size(tail), length = 0, done = 0;
    for (Py_ssize_t at = 0; at < count; at++) {
        char *bytes;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PyList_GetItem(tail, at), &bytes, &size)) return NULL;
        if (count == 1) return report_of(bytes, (size_t)size);
        length += size;
    }
    char *text = PyMem_Malloc((size_t)length + 1);
    if (!text) return PyErr_NoMemory();
    for (Py_ssize_t at = 0; at < count; at++) {
        char *bytes;
        Py_ssize_t size;
        PyBytes_AsStringAndSize(PyList_GetItem(tail, at), &bytes, &size);
        memcpy(text + done, bytes, (size_t)size);
        done += size;
    }
    PyObject *found = report_of(text, (size_t)length);
    PyMem_Free(text);
    return found;
}

// ---- the type

static PyObject **objects(Tally *t, int at) {
    PyObject **all[] = {&t->left, &t->prices, &t->ledger, &t->waiting, &t->otherwise, &t->running};
    return at < (int)(sizeof all / sizeof *all) ? all[at] : NULL;
}

static PyObject *tally_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    if (PyObject_Size(args) || kwargs) return PyErr_Format(PyExc_TypeError, "Tally() takes no arguments");
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Tally *t = (Tally *)allocate(type, 0);
    if (!t) return NULL;
    t->plain = 1;
    for (int at = 0; objects(t, at); at++) {
        Py_INCREF(Py_None);
        *objects(t, at) = Py_None;
    }
    Py_DECREF(t->running);
    t->running = PyDict_New();
    if (t->running) return (PyObject *)t;
    Py_DECREF(t);
    return NULL;
}

static int tally_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    for (int at = 0; objects((Tally *)self, at); at++) Py_VISIT(*objects((Tally *)self, at));
    return 0;
}

static int tally_clear(PyObject *self) {
    for (int at = 0; objects((Tally *)self, at); at++) Py_CLEAR(*objects((Tally *)self, at));
    return 0;
}

static void tally_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    tally_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

#define MEMBER(name, type, flags) {#name, type, offsetof(Tally, name), flags, NULL}
static PyMemberDef members[] = {
    MEMBER(now, T_DOUBLE, 0), MEMBER(clock, T_DOUBLE, 0), MEMBER(held, T_DOUBLE, 0), MEMBER(house, T_DOUBLE, 0),
    MEMBER(switch_seconds, T_DOUBLE, 0), MEMBER(holds, T_BOOL, 0), MEMBER(switching, T_BOOL, 0),
    MEMBER(plain, T_BOOL, 0), MEMBER(running, T_OBJECT_EX, READONLY), MEMBER(rest, T_DOUBLE, 0),
    MEMBER(epoch, T_DOUBLE, 0), MEMBER(made, T_PYSSIZET, 0), MEMBER(room, T_PYSSIZET, 0), MEMBER(left, T_OBJECT_EX, 0),
    MEMBER(prices, T_OBJECT_EX, 0), MEMBER(ledger, T_OBJECT_EX, 0), MEMBER(waiting, T_OBJECT_EX, 0),
    MEMBER(otherwise, T_OBJECT_EX, 0), {NULL, 0, 0, 0, NULL},
};
#define FAST(function) ((PyCFunction)(void (*)(void))function)
static PyMethodDef methods[] = {
    {"pass_to", tally_pass_to, METH_O, NULL},
    {"admitted", FAST(tally_admitted), METH_FASTCALL, NULL},
    {"over", FAST(tally_over), METH_FASTCALL, NULL},
    {"ended", FAST(tally_ended), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot slots[] = {
    {Py_tp_new, tally_new},         {Py_tp_dealloc, tally_dealloc}, {Py_tp_traverse, tally_traverse},
    {Py_tp_clear, tally_clear},     {Py_tp_members, members},       {Py_tp_methods, methods},
    {0, NULL},
};
static PyType_Spec spec = {"llmux.accounts._tally.Tally", sizeof(Tally), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};
static PyMethodDef functions[] = {{"told", told, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_tally", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__tally(void) {
    for (int at = 0; at < NAMES; at++)
        if (!names[at] && !(names[at] = PyUnicode_InternFromString(TEXTS[at]))) return NULL;
    if (!empty && !(empty = PyUnicode_InternFromString(""))) return NULL;
    if (!zero && !(zero = PyLong_FromLong(0))) return NULL;
    PyObject *made = PyModule_Create(&module), *type = PyType_FromSpec(&spec);
    if (made && type && !PyModule_AddObjectRef(made, "Tally", type)) {
        Py_DECREF(type);
        return made;
    }
    Py_XDECREF(made);
    Py_XDECREF(type);
    return NULL;
}

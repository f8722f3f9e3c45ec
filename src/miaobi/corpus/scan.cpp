// A block of UTF-8 in one pass: its characters, how often each occurs, and where its documents begin and end.
//
// Only the ordinary: text with a byte that is no UTF-8, or with a carriage return, is refused. What scan.py cannot mend
// Python reads, with its error messages; its own decoder and searches take three times as long (docs/lab-notes.md).
// tests/corpus/test_scan.py compares both.

#include <cstdint>
#include <cstring>
#ifdef __SSSE3__
#include <immintrin.h>
#endif

namespace {

enum Kind { kWhole, kText, kLines };  // as in scan.py
enum Stop { kNewline, kEnd, kRefuse };  // why decoding stopped

constexpr uint32_t kBeyond = 0xD800;  // + i, which no text has (they are surrogates), is character i of `beyond`
constexpr int kMost = 2048;

struct Document {                  // as in scan.py
    int64_t begin, end;            // bytes of the document
    int64_t content, content_end;  // bytes without the white space around it
    int64_t characters;
};

struct Result {  // as in scan.py
    int64_t characters, written, documents, beyond;
};

// Decodes characters of three bytes, four at a time, as long as there are four. Returns how many, `out` behind them.
int64_t fours(const uint8_t* in, const uint8_t* end, uint16_t*& out) {
    uint16_t* const begin = out;
#ifdef __SSSE3__
    const __m128i mask = _mm_setr_epi8(-16, -64, -64, -16, -64, -64, -16, -64, -64, -16, -64, -64, 0, 0, 0, 0);
    const __m128i form = _mm_setr_epi8(-32, -128, -128, -32, -128, -128, -32, -128, -128, -32, -128, -128, 0, 0, 0, 0);
    const __m128i turn = _mm_setr_epi8(2, 1, 0, -1, 5, 4, 3, -1, 8, 7, 6, -1, 11, 10, 9, -1);
    const __m128i low = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 1, 4, 5, 8, 9, 12, 13);
    for (; end - in >= 16; in += 12, out += 4) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)), w = _mm_shuffle_epi8(v, turn);
        const __m128i c = _mm_and_si128(w, _mm_set1_epi32(0x3F)), b = _mm_and_si128(w, _mm_set1_epi32(0x3F00));
        const __m128i a = _mm_and_si128(w, _mm_set1_epi32(0xF0000));
        const __m128i wide = _mm_or_si128(_mm_or_si128(c, _mm_srli_epi32(b, 2)), _mm_srli_epi32(a, 4));
        const __m128i points = _mm_shuffle_epi8(wide, low), top = _mm_and_si128(points, _mm_set1_epi16(-0x800));
        const __m128i bad = _mm_or_si128(_mm_cmpeq_epi16(top, _mm_setzero_si128()),
                                         _mm_cmpeq_epi16(top, _mm_set1_epi16(int16_t(0xD800))));
        const __m128i good = _mm_andnot_si128(bad, _mm_cmpeq_epi8(_mm_and_si128(v, mask), form));
        if (_mm_movemask_epi8(good) != 0xFFFF) break;
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), points);
    }
#endif
    return out - begin;
}

// What str.isspace() says, as do \s and str.strip().
bool is_space(uint16_t c) {
    if (c < 0x80) return c == ' ' || (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x1F);
    return c == 0x3000 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
           c == 0x2029 || c == 0x202F || c == 0x205F;
}

int64_t bytes(uint16_t space) { return space < 0x80 ? 1 : space < 0x800 ? 2 : 3; }

struct Scan {
    const uint8_t* text;
    int64_t size;
    uint16_t* points;
    uint32_t* counts;  // (65536,)
    uint8_t* dropped;  // (65536,) 1 for characters between documents
    uint32_t* beyond;  // (kMost,) distinct characters of more than 16 bits
    Document* documents;
    Result& result;
    int64_t at = 0, n = 0;  // bytes read, characters in points

    // The point for a character of more than 16 bits; 0 when there are too many of them.
    uint16_t point_beyond(uint32_t character) {
        int64_t i = 0;
        while (i < result.beyond && beyond[i] != character) ++i;
        if (i == kMost) return 0;
        if (i == result.beyond) beyond[result.beyond++] = character;
        return kBeyond + i;
    }

    // Decodes up to the end of a line, whose newline is not put into points.
    Stop decode() {
        const uint8_t *in = text + at, *const end = text + size;
        uint16_t* out = points + n;
        Stop why = kEnd;
        while (in < end) {
            in += 3 * fours(in, end, out);
            const uint32_t a = *in;
            const int64_t left = end - in;
            if (a < 0x80) {
                why = a == '\n' ? kNewline : a == '\r' ? kRefuse : kEnd;
                in += why != kRefuse;
                if (why != kEnd) break;
                *out++ = a;
                continue;
            }
            const uint32_t b = left > 1 ? in[1] ^ 0x80 : 255, c = left > 2 ? in[2] ^ 0x80 : 255;
            if (a >= 0xE0 && a < 0xF0) {
                const uint32_t point = (a & 15) << 12 | b << 6 | c;
                why = ((b | c) & 0xC0) || point < 0x800 || (point & 0xF800) == 0xD800 ? kRefuse : kEnd;
                *out = point;
                in += 3;
            } else if (a >= 0xC2 && a < 0xE0) {
                why = b & 0xC0 ? kRefuse : kEnd;
                *out = (a & 31) << 6 | b;
                in += 2;
            } else {
                const uint32_t d = left > 3 ? in[3] ^ 0x80 : 255, all = (a & 7) << 18 | b << 12 | c << 6 | d;
                const bool is_one = a >= 0xF0 && a < 0xF5 && !((b | c | d) & 0xC0) && all >= 0x10000 && all < 0x110000;
                *out = is_one ? point_beyond(all) : 0;
                why = *out ? kEnd : kRefuse;
                in += 4;
            }
            if (why == kRefuse) break;
            ++out;
        }
        at = in - text;
        n = out - points;
        return why;
    }

    void count(int64_t from) {
        for (; from < n; ++from) ++counts[points[from]];
    }

    bool is_blank(int64_t from) const {
        while (from < n && is_space(points[from])) ++from;
        return from == n;
    }

    // Forgets the points behind `from`, which are white space.
    void drop(int64_t from) {
        for (; n > from; --n) dropped[points[n - 1]] = 1;
    }

    // Points behind `from`, bytes begin..end of the text, are a document, unless they are blank.
    void finish(int64_t from, int64_t begin, int64_t end) {
        for (; n > from && points[n - 1] == '\n'; --n) --end;
        if (is_blank(from)) return drop(from);
        int64_t first = from, last = n, content = begin, content_end = end;
        for (; is_space(points[first]); ++first) content += bytes(points[first]);
        for (; is_space(points[last - 1]); --last) content_end -= bytes(points[last - 1]);
        documents[result.documents++] = {begin, end, content, content_end, n - from};
        count(from);
        points[n++] = '\n';
    }

    bool run(Kind kind) {
        int64_t from = 0, begin = 0;  // of the document at hand, in points and in text
        bool is_first = true;
        for (Stop why = kNewline; why == kNewline; is_first = false) {
            const int64_t line = n, line_begin = at;
            why = decode();
            if (why == kRefuse) return false;
            const bool ends = why == kNewline;
            result.characters += n - line + ends;
            if (ends) dropped['\n'] = 1;  // counted or not, it is there
            if (kind == kLines) {
                finish(line, line_begin, at - ends);
            } else if (kind == kWhole) {
                if (ends) points[n++] = '\n';
                count(line);
            } else if (ends && !is_first && is_blank(line)) {  // between two documents
                drop(line);
                finish(from, begin, line_begin);
                from = n, begin = at;
            } else if (ends && n == from) {  // documents do not begin with a newline
                begin = at;
            } else if (ends) {
                points[n++] = '\n';
            }
        }
        if (kind == kText) finish(from, begin, at);
        result.written = n;
        return true;
    }
};

}  // namespace

// text (size,) -> points: room for size + 1; counts and dropped (65536,): zeros; beyond (2048,); documents: room for one
// a line, or for none of kWhole. Points of documents have a newline behind each, which is not counted.
// Returns 0 where the text is refused.
extern "C" int miaobi_scan(const uint8_t* text, int64_t size, int kind, uint16_t* points, uint32_t* counts,
                           uint8_t* dropped, uint32_t* beyond, Document* documents, Result* result) {
    *result = {};
    return Scan{text, size, points, counts, dropped, beyond, documents, *result}.run(static_cast<Kind>(kind));
}

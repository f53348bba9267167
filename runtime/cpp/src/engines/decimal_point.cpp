#include "engines/decimal_point.hpp"

#include <new>

namespace tmd::internal {

DecimalPoint::DecimalPoint() : plain_(::newlocale(LC_NUMERIC_MASK, "C", nullptr)) {
  if (!plain_) throw std::bad_alloc();
  before_ = ::uselocale(plain_);
}

DecimalPoint::~DecimalPoint() {
  ::uselocale(before_);
  ::freelocale(plain_);
}

}  // namespace tmd::internal
